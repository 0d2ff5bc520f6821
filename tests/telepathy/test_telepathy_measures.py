"""The examination: each measure against results of known value, and the files and events that a test writes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.problem_parts import CATEGORY_OF, OBJECTS
from datamodules.problems import Problem, generate, generate_passkey, generate_twins
from lightning_modules.core.diversity import distinct, distinct_n
from lightning_modules.core.intervals import wilson_interval
from lightning_modules.pretrained.answers import Answer
from lightning_modules.telepathy.draw import GROUP
from lightning_modules.telepathy.layout import Row
from lightning_modules.telepathy.measures import FROM_TARGET, measure, scores, stack_soft
from lightning_modules.telepathy.results import Measures, ProblemResult, bootstrap

FIGURES = ("loss_by_position", "soft_tokens", "soft_token_cosines")
LEVELS = {"bridge": 0.5, "zero": 2.5, "text": 0.25, "none": 2.0}
ROW = Row([0], 1, [1, 2])


def make(problems: list[Problem], outputs: list[str], shift: float = 0.0, **options) -> list[ProblemResult]:
    """Return results with known losses. Tokens differ within an answer, and answers by noise that conditions share."""
    noise = np.random.default_rng(1).normal(size=len(problems))
    results = []
    for problem, output, extra in zip(problems, outputs, noise, strict=True):
        losses = {name: np.array([level - 0.1, level + 0.1]) + 0.1 * extra for name, level in LEVELS.items()}
        losses["shuffled"] = losses["bridge"] + shift + 0.1 * np.random.default_rng(len(results)).normal()
        texts = {"bridge": output, "shuffled": "", "zero": "", "text": problem.answer}
        answers = {condition: Answer(text, False) for condition, text in texts.items()}
        results.append(ProblemResult(problem, ROW, 4, answers, losses, **options))
    return results


@pytest.fixture(scope="module")
def many() -> list[Problem]:
    return [generate(3, "train", index) for index in range(200)]


@pytest.fixture(scope="module")
def perfect(many):
    return measure(make(many, [problem.answer for problem in many], shift=1.0))


def test_accuracy_and_its_interval(many):
    outputs = [problem.answer if i < 150 else "#### -1" for i, problem in enumerate(many)]
    measures = measure(make(many, outputs))
    assert measures.values["accuracy"] == measures.values["relative_accuracy"] == 0.75
    assert measures.values["text_accuracy"] == 1
    assert measures.intervals["accuracy"] == wilson_interval(150, 200)
    none = dict.fromkeys(("shuffled_accuracy", "zero_accuracy", "truncated", "text_truncated"), 0)
    assert measures.hits == {"accuracy": 150, "text_accuracy": 200, **none}
    assert measures.counts.keys() == measures.values.keys()
    assert measures.values["distinct"] == distinct(outputs)
    assert measures.values["distinct_2"] == distinct_n(outputs, 2) != distinct_n(outputs, 1)


def test_losses_gain_and_recovery_are_means_over_answers(perfect):
    metrics, intervals = perfect.values, perfect.intervals
    noise = 0.1 * np.random.default_rng(1).normal(size=200).mean()
    assert metrics["ce_bridge"] == pytest.approx(0.5 + noise)
    assert metrics["ce_none"] == pytest.approx(2 + noise)
    assert metrics["ce_zero"] == pytest.approx(2.5 + noise)
    assert metrics["bridge_gain"] == pytest.approx(1.5)
    assert metrics["recovery"] == pytest.approx(1.5 / 1.75)
    assert intervals["recovery"] == pytest.approx((1.5 / 1.75, 1.5 / 1.75))
    assert intervals["bridge_gain"] == pytest.approx((1.5, 1.5))


def with_prefix(results: list[ProblemResult], right: int) -> list[ProblemResult]:
    """Add answers behind a prefix, of which the first `right` are right and the others cut."""
    for i, result in enumerate(results):
        result.answers["text_prefix"] = Answer(result.problem.answer if i < right else "#### -1", i >= right)
        result.losses["text_prefix"] = result.losses["text"] + 0.25
    return results


def test_controls_and_cut_answers(many):
    results = with_prefix(make(many, [problem.answer for problem in many[:100]] + [""] * 100), 160)
    for i, result in enumerate(results):
        result.answers["shuffled"].text = result.problem.answer if i % 40 == 0 else ""
        result.answers["zero"].text = result.problem.answer if i % 100 == 0 else ""
        result.answers["bridge"].is_cut, result.answers["text"].is_cut = i % 4 == 0, i % 50 == 0
    measures = measure(results)
    wanted = {"shuffled_accuracy": 5, "zero_accuracy": 2, "text_prefix_accuracy": 160}
    wanted |= {"truncated": 50, "text_truncated": 4, "text_prefix_truncated": 40}
    for name, hits in wanted.items():
        assert (measures.hits[name], measures.counts[name], measures.values[name]) == (hits, 200, hits / 200)
        assert measures.intervals[name] == wilson_interval(hits, 200)
    assert measures.values["ce_text_prefix"] == pytest.approx(measures.values["ce_text"] + 0.25)
    assert measures.values["relative_accuracy"] == 100 / 160  # to the text behind the prefix, not to the text


def test_a_ratio_to_nearly_nothing_is_absent(many):
    outputs = [problem.answer for problem in many]
    for hits, has_ratio in ((0, False), (1, False), (10, False), (30, True)):
        results = with_prefix(make(many, outputs), hits)
        assert ("relative_accuracy" in measure(results).values) == has_ratio
        for result in results:  # without a prefix, the denominator is the text
            result.answers["text"] = result.answers.pop("text_prefix")
        assert ("relative_accuracy" in measure(results).values) == has_ratio
    for gain, has_recovery in ((-1.0, False), (0.0, False), (0.08, False), (0.2, True)):
        results = make(many, outputs)
        for result in results:
            result.losses["text"] = result.losses["none"] - gain
        measures = measure(results)
        assert ("recovery" in measures.values) == ("recovery" in measures.counts) == has_recovery
        assert measures.values["bridge_gain"] == pytest.approx(1.5)


def test_recovery_is_the_ratio_of_two_means_and_absent_where_the_second_may_be_near_zero(many):
    results = make(many, [""] * 200)
    for i, result in enumerate(results):
        result.losses["text"] = result.losses["none"] - (1 if i % 2 else 3)
    measures = measure(results)
    assert measures.values["recovery"] == pytest.approx(1.5 / 2)  # and not (1.5 / 1 + 1.5 / 3) / 2
    low, high = measures.intervals["recovery"]
    assert 0.65 < low < 0.75 < high < 0.85
    for i, result in enumerate(results):
        result.losses["text"] = result.losses["none"] - 0.2 + (1 if i % 2 else -1)
    assert "recovery" not in measure(results).values  # 0.2 ± 0.14 of 2 nats


@pytest.mark.parametrize(("shift", "excludes"), [(0.05, True), (0.0, False)])
def test_the_interval_of_specificity_excludes_zero_when_it_should(many, shift, excludes):
    measures = measure(make(many, [""] * 200, shift=shift))
    low, high = measures.intervals["source_specificity"]
    assert low < measures.values["source_specificity"] < high
    assert (low > 0) == excludes
    losses = [result.losses for result in make(many, [""] * 200)]
    spread = np.std([loss["shuffled"].mean() - loss["bridge"].mean() for loss in losses])
    assert high - low == pytest.approx(2 * 1.96 * spread / math.sqrt(200), rel=0.15)


def test_entity_transfer_is_one_for_all_zero_for_none_and_zero_for_chance(many, perfect):
    for name in ("entity_transfer", "entity_transfer_name", "entity_transfer_object", "entity_transfer_number"):
        assert perfect.values[name] == 1
        assert perfect.intervals[name] == (1, 1)
    assert 0 < perfect.values["entity_chance"] < 0.2

    nothing = measure(make(many, ["no word of it"] * 200)).values
    assert nothing["entity_recall"] == nothing["entity_chance"] == nothing["entity_transfer"] == 0
    everything = " ".join(word for problem in many[:40] for words in problem.entities.values() for word in words)
    assert measure(make(many[:40], [everything] * 40)).values["entity_transfer"] == 0  # recall 1, and chance 1

    others = measure(make(many, [many[i - 100].answer for i in range(200)]))
    assert others.values["entity_recall"] > 0
    low, high = others.intervals["entity_transfer"]
    assert low <= 0 <= high
    assert abs(others.values["entity_transfer"]) < 0.03

    measures = measure(make(many, [p.answer if i % 2 else "" for i, p in enumerate(many)]))
    half, intervals = measures.values, measures.intervals
    entities = [[sum(map(len, p.entities.values())) for p in many[k::2]] for k in (0, 1)]
    assert half["entity_recall"] == pytest.approx(sum(entities[1]) / (sum(entities[0]) + sum(entities[1])))
    e, e0 = half["entity_recall"], half["entity_chance"]
    assert half["entity_transfer"] == pytest.approx((e - e0) / (1 - e0))
    low, high = intervals["entity_transfer"]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(200) / (1 - e0), rel=0.15)


def test_entities_are_whole_words_by_type():
    problems = [
        Problem("q1", "a #### 1", {"name": ("Ann",), "number": ("12", "3")}),
        Problem("q2", "a #### 2", {"name": ("Bob",)}),
        Problem("q3", "a #### 3", {}),
    ]
    measures = measure(make(problems, ["Anna has 12 and 33", "Bob", "Eve and Ann"]))
    assert measures.values["entity_recall_name"] == 0.5
    assert measures.values["entity_recall_number"] == 0.5
    assert measures.values["entity_recall"] == 0.5
    # One of the two outputs for other questions has Ann, none has Bob or a number
    assert measures.values["entity_chance_name"] == 0.5 / 2
    assert measures.values["entity_chance"] == 0.5 / 4
    assert "entity_transfer_object" not in measures.values
    answers = {"entity_recall_name": 2, "entity_recall_number": 1, "entity_recall": 2}  # those with such entities
    assert {name: measures.counts[name] for name in answers} == answers
    assert measure(make(problems[:2], ["Anna", "Bob Ann"])).values["entity_chance_name"] == 0.5


def test_few_problems_with_entities_have_an_interval():
    problems = [Problem(f"q{i}", "#### 1", {} if i else {"name": ("Ann",)}) for i in range(4)]
    measures = measure(make(problems, ["Ann", "", "", ""]))
    assert measures.intervals["entity_transfer"] == (0, 1)  # some resamples have no entity


def test_a_kind_without_entities_has_no_score():
    problem = Problem("q", "#### 1", {"name": (), "number": ("12", "3")})
    assert scores(problem, "12 #### 1") == {"accuracy": 1, "entity_number": 0.5}


def test_texts_without_entities_have_no_entity_measures():
    for questions in ("qqq", "qrs"):
        names = measure(make([Problem(question, "#### 1") for question in questions], ["", "", ""])).values
        assert not any("entity" in name or "twin" in name or "retrieval" in name for name in names)


WRONG = (  # question, the answer's object, output
    ("Ann has apples.", "apples", "Ann has 3 pears and cups."),  # wrong: pears, of the right category
    ("Bob has bananas.", "bananas", "cups"),  # wrong: cups, of another category
    ("Cy has cups, but no beads.", "cups", "beads or hats"),  # wrong: hats, since the question names beads
    ("Di has plates.", "plates", "mugs on plates"),  # names the right object
    ("Ed has spoons.", "spoons", "mugs"),  # wrong: mugs, of the right category
    ("Flo has forks.", "forks", "Flo has pitchforks."),  # names no object
    ("Gus has toys.", None, "cards"),  # its answer has no object
    ("Hal has unicorns.", "unicorns", "cards"),  # an object without a category
)


def wrong_objects(cases) -> list[ProblemResult]:
    objects = [{"object": (right,)} if right else {} for _, right, _ in cases]
    problems = [Problem(question, "#### 1", of) for (question, _, _), of in zip(cases, objects, strict=True)]
    return make(problems, [output for _, _, output in cases])


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_category_transfer_of_a_few_answers(order):
    measures = measure(wrong_objects(WRONG[order]))
    # Of the objects written for others: none of 3 is food, then 1 of 3. Mugs, and not pears, for cups: cups would be
    # right. Cups, and not pears and hats, for spoons.
    chance = (0 + 1 / 3 + 1 / 2 + 1 / 3) / 4
    assert measures.values["category_share"] == 1 / 2
    assert (measures.hits["category_share"], measures.counts["category_share"]) == (2, 4)
    assert measures.values["category_chance"] == pytest.approx(chance)
    assert measures.values["category_transfer"] == pytest.approx((1 / 2 - chance) / (1 - chance))
    expected = [(share - chance) / (1 - chance) for share in wilson_interval(2, 4)]
    assert measures.intervals["category_transfer"] == pytest.approx(expected)
    shares = [
        scores(result.problem, result.answers["bridge"].text).get("category_share") for result in wrong_objects(WRONG)
    ]
    assert shares == [1, 0, 0, None, 1, None, None, None]


def test_category_transfer_is_zero_for_one_object_and_for_chance_and_one_for_the_category(many):
    one = measure(make(many, ["apples"] * 200)).values
    assert 0 < one["category_share"] == pytest.approx(one["category_chance"])
    assert one["category_transfer"] == pytest.approx(0)

    drawn = np.random.default_rng(0).choice(OBJECTS, 200)
    measures = measure(make(many, drawn.tolist()))
    assert measures.counts["category_transfer"] > 150
    low, high = measures.intervals["category_transfer"]
    assert low < 0 < high < 0.1

    of_category = [
        next(w for w in OBJECTS if CATEGORY_OF[w] == p.category and w not in p.question) if p.category else ""
        for p in many
    ]
    measures = measure(make(many, of_category))
    assert measures.values["category_share"] == measures.values["category_transfer"] == 1
    assert measures.intervals["category_transfer"][0] > 0.95


def test_without_wrong_objects_of_two_questions_there_is_no_category_transfer(many, perfect):
    names = {"category_share", "category_chance", "category_transfer"}
    assert not names & perfect.values.keys()
    assert not names & measure(make(many, [""] * 200)).values.keys()
    assert not names & measure(wrong_objects(WRONG[:1] + WRONG[3:4])).values.keys()
    assert not names & measure(wrong_objects(WRONG[:1] * 2)).values.keys()  # twice the same question
    same = measure(wrong_objects((WRONG[0], ("Bob has bananas.", "bananas", "pears")))).values
    assert (same["category_share"], same["category_chance"], "category_transfer" in same) == (1, 1, False)
    diverged = wrong_objects(WRONG)
    diverged[0].losses["bridge"] = np.array([math.nan])
    assert all(math.isnan(measure(diverged).values[name]) for name in names)


def candidates(scores: np.ndarray, own: int = 0) -> Measures:
    problems = [Problem("q", f"#### {i}") for i in range(len(scores))]
    results = make(problems, [""] * len(scores))
    for i, (result, scores_G) in enumerate(zip(results, scores, strict=True)):
        result.own = (own + i) % GROUP
        result.candidates_G = np.roll(scores_G, result.own)
    results.append(make(problems[:1], [""])[0])  # one outside of full groups
    return measure(results)


def test_retrieval_and_its_bound():
    scores = np.full((20, GROUP), -50.0)
    assert candidates(scores).values["infonce_bound"] == pytest.approx(0, abs=1e-12)
    for own in range(GROUP):  # the same soft tokens for every question: chance, up to rounding
        same = np.full((24, GROUP), -50.0) + 1e-5 * np.random.default_rng(own).normal(size=(24, GROUP))
        assert candidates(same, own).values["retrieval"] == 1 / GROUP
    scores[:, 0] = -1
    measures = candidates(scores)
    assert (measures.values["retrieval"], measures.intervals["retrieval"]) == (1, wilson_interval(20, 20))
    assert (measures.hits["retrieval"], measures.counts["retrieval"], measures.counts["accuracy"]) == (20, 20, 21)
    assert math.log(GROUP) - 1e-6 < measures.values["infonce_bound"] <= math.log(GROUP)
    scores[:5, 3] = 0
    measures = candidates(scores)
    assert (measures.values["retrieval"], measures.intervals["retrieval"]) == (0.75, wilson_interval(15, 20))
    assert measures.hits["retrieval"] == 15
    wanted = math.log(GROUP) - (5 * math.log(1 + math.e) + 15 * math.log1p(7 * math.exp(-49))) / 20
    assert measures.values["infonce_bound"] == pytest.approx(wanted)
    for seed in range(20):
        drawn = np.random.default_rng(seed).normal(size=(40, GROUP)) * 10.0 ** (seed % 5)
        drawn[:, 0] += 1e3 * (seed % 3)
        assert candidates(drawn).values["infonce_bound"] <= math.log(GROUP)


def test_twins_are_consistent_if_both_are_right():
    twins = [problem for index in range(20) for problem in generate_twins(0, "test", index)]
    outputs = [problem.answer for problem in twins]
    outputs[0] = outputs[2] = outputs[3] = ""
    measures = measure(make(twins, outputs))
    assert measures.values["twin_consistency"] == 18 / 20
    assert measures.intervals["twin_consistency"] == wilson_interval(18, 20)
    assert (measures.hits["twin_consistency"], measures.counts["twin_consistency"]) == (18, 20)  # of pairs
    for i, twin in enumerate(others := [replace(problem) for problem in twins[:4]]):
        twin.template, twin.pair = f"template {i // 2}", 0  # each template counts its pairs from 0
    assert measure(make(others, [twin.answer for twin in others])).counts["twin_consistency"] == 2
    shuffled = np.random.default_rng(0).permutation(40)[:39]  # one of them has lost its twin
    measures = measure(make([twins[i] for i in shuffled], [twins[i].answer for i in shuffled]))
    assert (measures.values["twin_consistency"], measures.counts["twin_consistency"]) == (1, 19)


def test_problems_of_other_sets_are_no_twins(many):
    passkeys = [generate_passkey(0, "test", index) for index in range(8)]
    assert all(problem.pair is None for problem in [*many, *passkeys, Problem("q", "#### 1")])
    for count in (2, 3, 10, 30):  # among so few, some templates come exactly twice
        assert "twin_consistency" not in measure(make(many[:count], [""] * count)).values


def test_the_bootstrap_is_deterministic_and_covers_the_mean():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap(400, lambda i: values[i].mean())
    assert (low, high) == bootstrap(400, lambda i: values[i].mean())
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.3 * error)


def test_measures_are_the_same_again(many, perfect):
    again = measure(make(many, [problem.answer for problem in many], shift=1.0))
    assert again == perfect


def test_spread_of_soft_tokens(many):
    results = make(many[:40], [""] * 40, soft_KD=np.ones((4, 6), np.float32))
    metrics = measure(results).values
    assert metrics["cosine"] == pytest.approx(1, abs=1e-5)
    assert metrics["between_input_variance"] == pytest.approx(0, abs=1e-5)
    assert metrics["effective_rank"] == 0
    for i, result in enumerate(results):
        result.soft_KD = np.zeros((4 + i % 3, 40), np.float32)
        result.soft_KD[:, i] = 1
    measures = measure([*results, *make(many[40:50], [""] * 10)])  # the soft tokens of the last ten were not kept
    assert measures.values["cosine"] == pytest.approx(0, abs=1e-5)
    assert measures.values["between_input_variance"] > 0.9
    assert measures.values["effective_rank"] > 35
    assert (measures.counts["cosine"], measures.counts["accuracy"]) == (40, 50)
    ragged = [[[1.0]], [[-1.0]], [[1.0], [5.0]]]  # a single input has a second soft token, which does not count
    three = [replace(result, soft_KD=np.array(soft_KD)) for result, soft_KD in zip(results[:3], ragged, strict=True)]
    assert measure(three).values["between_input_variance"] == pytest.approx(8 / 9)
    assert stack_soft([result.soft_KD for result in results]).shape == (40, 6, 40)


def test_a_bridge_that_diverged_has_no_measures():
    twins = [problem for index in range(4) for problem in generate_twins(0, "test", index)]
    outputs = [problem.answer for problem in twins]
    codes = {"codes_K": np.array([3, 5, 5, 3])}
    results = make(twins, outputs, soft_KD=np.full((4, 6), np.nan), candidates_G=np.full(GROUP, np.nan), **codes)
    for result in results:
        result.losses["bridge"] = result.losses["shuffled"] = np.full(2, np.nan)
    measures = measure(with_prefix(results, 8))
    assert set(measures.hits) == set(measures.intervals) == {name for name in FROM_TARGET if "ce_" not in name}
    assert measures.intervals["text_accuracy"] == wilson_interval(8, 8)
    assert {name for name, value in measures.values.items() if math.isfinite(value)} == set(FROM_TARGET)
    sound = measure(
        with_prefix(make(twins, outputs, soft_KD=np.ones((4, 6)), candidates_G=np.zeros(GROUP), **codes), 8)
    )
    assert measures.values.keys() == sound.values.keys()
    assert sound.values["code_perplexity"] == pytest.approx(2)
    assert {"accuracy", "retrieval", "twin_consistency", "entity_transfer", "cosine"} <= sound.values.keys()


def test_a_prefix_that_diverged_has_no_measures(many):
    results = with_prefix(make(many, [problem.answer for problem in many]), 150)
    for result in results:
        result.losses["text_prefix"] = np.full(2, np.nan)
    values = measure(results).values
    lost = {"text_prefix_accuracy", "text_prefix_truncated", "ce_text_prefix", "relative_accuracy"}
    assert {name for name, value in values.items() if math.isnan(value)} == lost


def test_what_a_test_leaves_behind(run, workplace):
    sizes = ["--data.test_sets", '{"test": 16, "twin": 6}', "--model.max_new_tokens", "80"]
    done = run("test", "telepathy_v15", *sizes, "--trainer.default_root_dir", "mine")
    events = EventAccumulator(str(workplace / "mine"), size_guidance={"images": 0, "tensors": 0}).Reload()
    wanted = {f"{name}/{figure}" for name in ("test", "twin") for figure in FIGURES}
    assert wanted <= set(events.Tags()["images"])
    assert {"test/samples/text_summary", "twin/samples/text_summary"} <= set(events.Tags()["tensors"])
    record = json.loads((workplace / "mine" / "results.json").read_text())
    for name, count in {"test": 16, "twin": 6}.items():
        lines = (workplace / "mine" / "samples" / f"{name}.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        assert {sample["prompt"] for sample in samples} == {p.question for p in done.datamodule.eval_problems[name]}
        assert set(samples[0]["scores"]) == {"accuracy", "text_accuracy"}
        assert record["n"][f"{name}/accuracy"] == count
        assert record["n"].get(f"{name}/retrieval", 0) == count // GROUP * GROUP
        assert record["metrics"][f"{name}/accuracy"] == pytest.approx(done.model.hits[f"{name}/accuracy"][0] / count)
        assert len(record["intervals"][f"{name}/accuracy"]) == 2
    assert ("twin/twin_consistency" in record["metrics"], "test/twin_consistency" in record["metrics"]) == (True, False)
    proportions = {"accuracy", "text_accuracy", "shuffled_accuracy", "zero_accuracy", "truncated", "text_truncated"}
    proportions |= {"retrieval"}
    assert {name for name in done.model.hits if name.startswith("test/")} == {f"test/{name}" for name in proportions}
    assert record["n"]["twin/twin_consistency"] == 3
    soft_tokens = done.model.collate(done.datamodule.eval_problems["test"], False)["soft_mask"].sum().item() / 16
    assert record["metrics"]["test/soft_bits"] == pytest.approx(16 * done.model.target.width * soft_tokens)
    assert record["metrics"]["test/infonce_bound"] <= math.log(GROUP)
    assert record["metrics"]["test/text_accuracy"] >= 0.9
    assert not any(value is None for value in record["metrics"].values())
