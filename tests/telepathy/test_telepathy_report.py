"""The examination: each measure against rows whose value is known, and what it leaves on disk and in TensorBoard."""

import json
import math

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.problems import Problem, generate, generate_passkey, generate_twins
from lightning_modules.core.diversity import distinct
from lightning_modules.core.metrics import wilson_interval
from lightning_modules.telepathy.report import GROUP, Row, bootstrap, measures, stack_soft

CONDITIONS = {"bridge": 0.5, "shuffled": 1.5, "text": 0.25, "none": 2.0}


def make(problems: list[Problem], outputs: list[str], shift: float = 0.0, **options) -> list[Row]:
    """Rows with known losses; tokens of a row differ, and rows by noise that all conditions share."""
    noise = np.random.default_rng(1).normal(size=len(problems))
    rows = []
    for problem, output, extra in zip(problems, outputs, noise, strict=True):
        losses = {name: np.array([level - 0.1, level + 0.1]) + 0.1 * extra for name, level in CONDITIONS.items()}
        losses["shuffled"] = losses["bridge"] + shift + 0.1 * np.random.default_rng(len(rows)).normal()
        rows.append(Row(problem, output, problem.answer, losses, 4, **options))
    return rows


@pytest.fixture(scope="module")
def many() -> list[Problem]:
    return [generate(3, "train", index) for index in range(200)]


@pytest.fixture(scope="module")
def perfect(many):
    return measures(make(many, [problem.answer for problem in many], shift=1.0))


def test_accuracy_and_its_interval(many):
    outputs = [problem.answer if i < 150 else "#### -1" for i, problem in enumerate(many)]
    metrics, intervals = measures(make(many, outputs))
    assert metrics["accuracy"] == metrics["relative_accuracy"] == 0.75
    assert metrics["text_accuracy"] == 1
    assert intervals["accuracy"] == wilson_interval(150, 200)
    assert metrics["distinct"] == distinct(outputs)


def test_losses_gain_and_recovery_are_means_over_answers(perfect):
    metrics, intervals = perfect
    noise = 0.1 * np.random.default_rng(1).normal(size=200).mean()
    assert metrics["ce_bridge"] == pytest.approx(0.5 + noise)
    assert metrics["ce_none"] == pytest.approx(2 + noise)
    assert metrics["bridge_gain"] == pytest.approx(1.5)
    assert metrics["recovery"] == pytest.approx(1.5 / 1.75)
    assert intervals["recovery"] == pytest.approx((1.5 / 1.75, 1.5 / 1.75))
    assert intervals["bridge_gain"] == pytest.approx((1.5, 1.5))


@pytest.mark.parametrize(("shift", "excludes"), [(0.05, True), (0.0, False)])
def test_the_interval_of_specificity_excludes_zero_when_it_should(many, shift, excludes):
    metrics, intervals = measures(make(many, [""] * 200, shift=shift))
    low, high = intervals["source_specificity"]
    assert low < metrics["source_specificity"] < high
    assert (low > 0) == excludes
    spread = np.std([row.losses["shuffled"].mean() - row.losses["bridge"].mean() for row in make(many, [""] * 200)])
    assert high - low == pytest.approx(2 * 1.96 * spread / math.sqrt(200), rel=0.15)


def test_entity_transfer_is_one_for_all_zero_for_none_and_zero_for_chance(many, perfect):
    for name in ("entity_transfer", "entity_transfer_name", "entity_transfer_object", "entity_transfer_number"):
        assert perfect[0][name] == 1
        assert perfect[1][name] == (1, 1)
    assert 0 < perfect[0]["entity_chance"] < 0.2

    nothing, intervals = measures(make(many, ["no word of it"] * 200))
    assert nothing["entity_recall"] == nothing["entity_chance"] == nothing["entity_transfer"] == 0
    everything = " ".join(word for problem in many for words in problem.entities.values() for word in words)
    assert measures(make(many, [everything] * 200))[0]["entity_transfer"] == 0  # recall 1, and chance 1

    others, intervals = measures(make(many, [many[i - 100].answer for i in range(200)]))
    assert others["entity_recall"] > 0
    low, high = intervals["entity_transfer"]
    assert low <= 0 <= high
    assert abs(others["entity_transfer"]) < 0.03

    half, _ = measures(make(many, [p.answer if i % 2 else "" for i, p in enumerate(many)]))
    entities = [[sum(map(len, p.entities.values())) for p in many[k::2]] for k in (0, 1)]
    assert half["entity_recall"] == pytest.approx(sum(entities[1]) / (sum(entities[0]) + sum(entities[1])))
    e, e0 = half["entity_recall"], half["entity_chance"]
    assert half["entity_transfer"] == pytest.approx((e - e0) / (1 - e0))


def test_entities_are_whole_words_by_type():
    problems = [
        Problem("q", "a #### 1", {"name": ("Ann",), "number": ("12", "3")}),
        Problem("q", "a #### 2", {"name": ("Bob",)}),
        Problem("q", "a #### 3", {}),
    ]
    metrics, _ = measures(make(problems, ["Anna has 12 and 33", "Bob", "Eve"]))
    assert metrics["entity_recall_name"] == 0.5
    assert metrics["entity_recall_number"] == 0.5
    assert metrics["entity_recall"] == 0.5
    assert "entity_transfer_object" not in metrics


def test_texts_without_entities_have_no_entity_measures():
    metrics, _ = measures(make([Problem("q", f"#### {i}") for i in range(3)], ["", "", ""]))
    assert not any("entity" in name or "twin" in name or "retrieval" in name for name in metrics)


def candidates(scores: np.ndarray) -> dict[str, float]:
    problems = [Problem("q", f"#### {i}") for i in range(len(scores))]
    rows = make(problems, [""] * len(scores))
    for row, own in zip(rows, scores, strict=True):
        row.candidates = own
    rows.append(make(problems[:1], [""])[0])  # one that no group had room for
    return measures(rows)


def test_retrieval_and_its_bound():
    scores = np.full((20, GROUP), -50.0)
    metrics, _ = candidates(scores)
    assert metrics["infonce_bound"] == pytest.approx(0, abs=1e-12)
    scores[:, 0] = -1
    metrics, intervals = candidates(scores)
    assert (metrics["retrieval"], intervals["retrieval"]) == (1, wilson_interval(20, 20))
    assert math.log(GROUP) - 1e-6 < metrics["infonce_bound"] <= math.log(GROUP)
    scores[:5, 3] = 0
    metrics, intervals = candidates(scores)
    assert (metrics["retrieval"], intervals["retrieval"]) == (0.75, wilson_interval(15, 20))
    wanted = math.log(GROUP) - (5 * math.log(1 + math.e) + 15 * math.log1p(7 * math.exp(-49))) / 20
    assert metrics["infonce_bound"] == pytest.approx(wanted)
    for seed in range(20):
        drawn = np.random.default_rng(seed).normal(size=(40, GROUP)) * 10.0 ** (seed % 5)
        drawn[:, 0] += 1e3 * (seed % 3)
        assert candidates(drawn)[0]["infonce_bound"] <= math.log(GROUP)


def test_twins_are_consistent_if_both_are_right():
    twins = [problem for index in range(20) for problem in generate_twins(0, "test", index)]
    outputs = [problem.answer for problem in twins]
    outputs[0] = outputs[2] = outputs[3] = ""
    metrics, intervals = measures(make(twins, outputs))
    assert metrics["twin_consistency"] == 18 / 20
    assert intervals["twin_consistency"] == wilson_interval(18, 20)
    shuffled = np.random.default_rng(0).permutation(40)[:39]  # one of them has lost its twin
    metrics, _ = measures(make([twins[i] for i in shuffled], [twins[i].answer for i in shuffled]))
    assert metrics["twin_consistency"] == 1


def test_problems_of_other_sets_are_no_twins(many):
    passkeys = [generate_passkey(0, "test", index) for index in range(8)]
    assert all(problem.pair is None for problem in [*many, *passkeys, Problem("q", "#### 1")])
    for count in (2, 3, 10, 30):  # among so few, some templates come exactly twice
        assert "twin_consistency" not in measures(make(many[:count], [""] * count))[0]


def test_the_bootstrap_is_deterministic_and_covers_the_mean():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap(400, lambda i: values[i].mean())
    assert (low, high) == bootstrap(400, lambda i: values[i].mean())
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.3 * error)


def test_measures_are_the_same_again(many, perfect):
    again = measures(make(many, [problem.answer for problem in many], shift=1.0))
    assert again == perfect


def test_spread_of_soft_tokens(many):
    same = make(many[:40], [""] * 40, soft=np.ones((4, 6), np.float32))
    metrics, _ = measures(same)
    assert metrics["cosine"] == pytest.approx(1, abs=1e-5)
    assert metrics["between_input_variance"] == pytest.approx(0, abs=1e-5)
    assert metrics["effective_rank"] == 0
    for i, row in enumerate(same):
        row.soft = np.zeros((4 + i % 3, 40), np.float32)
        row.soft[:, i] = 1
    metrics, _ = measures(same)
    assert metrics["cosine"] == pytest.approx(0, abs=1e-5)
    assert metrics["between_input_variance"] > 0.9
    assert metrics["effective_rank"] > 35
    assert stack_soft([row.soft for row in same]).shape == (40, 6, 40)


def test_what_a_test_leaves_behind(run, workplace):
    sizes = ["--data.test_sets", '{"test": 16, "twin": 6}', "--model.max_new_tokens", "80"]
    done = run("test", "telepathy_v15", *sizes, "--trainer.default_root_dir", "mine")
    events = EventAccumulator(str(workplace / "mine"), size_guidance={"images": 0, "tensors": 0}).Reload()
    wanted = {f"{name}/{figure}" for name in ("test", "twin") for figure in ("loss_by_position", "soft_tokens")}
    assert wanted <= set(events.Tags()["images"])
    assert {"test/samples/text_summary", "twin/samples/text_summary"} <= set(events.Tags()["tensors"])
    record = json.loads((workplace / "mine" / "results.json").read_text())
    for name, count in {"test": 16, "twin": 6}.items():
        lines = (workplace / "mine" / "samples" / f"{name}.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        assert {sample["prompt"] for sample in samples} == {p.question for p in done.datamodule.eval_problems[name]}
        assert set(samples[0]["scores"]) == {"accuracy", "text_accuracy"}
        assert record["n"][f"{name}/accuracy"] == count
        assert len(record["intervals"][f"{name}/accuracy"]) == 2
    assert ("twin/twin_consistency" in record["metrics"], "test/twin_consistency" in record["metrics"]) == (True, False)
    assert record["metrics"]["test/soft_bytes"] == 2 * done.model.target.width * done.model.bridge.soft_tokens
    assert record["metrics"]["test/infonce_bound"] <= math.log(GROUP)
    assert record["metrics"]["test/text_accuracy"] >= 0.9
    assert not any(value is None for value in record["metrics"].values())
