"""What needs the whole test set: the draw, the work of each rank, and the same measures for any batches."""

from contextlib import contextmanager
from functools import partial
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import QUIET
from lightning import Trainer

from datamodules import WordProblems
from datamodules.errors import UserError
from datamodules.problem_parts import OBJECTS
from datamodules.problems import Problem, generate, generate_passkey, generate_twins
from lightning_modules.pretrained.answers import Answer
from lightning_modules.telepathy import TokenBridge, controls, evaluation, examination
from lightning_modules.telepathy.draw import DRAWN, GROUP, Draw
from lightning_modules.telepathy.layout import Row
from lightning_modules.telepathy.results import ProblemResult
from lightning_modules.telepathy.target import Target

LENGTHS = (2, 3, 5)
REPEATED = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]  # 9 different questions: one group of 8, and one outside


class Ended(Exception):
    """The end of one rank's part, in which only the exchange with the others is left."""


class Fake:
    """A module whose losses and answers are sums, which shows what was computed from what, and how often."""

    answer_limit, device = 8, torch.device("cpu")

    def __init__(self, rank: int, world: int):
        self.trainer = SimpleNamespace(
            global_rank=rank,
            world_size=world,
            is_global_zero=rank == 0,
            progress_bar_callback=None,
            strategy=SimpleNamespace(batch_to_device=lambda batch: batch),
            precision_plugin=SimpleNamespace(test_step_context=self.autocast),
        )
        self.target = SimpleNamespace(width=2, losses=self.losses, answers=self.answers)
        self.read, self.answered, self.asked, self.casts = [], [], [], False

    @contextmanager
    def autocast(self):
        self.casts = True
        yield
        self.casts = False

    def collate(self, problems, training):
        assert not training
        numbers = [int(problem.question.split()[1]) for problem in problems]
        lengths = torch.tensor([LENGTHS[number % 3] for number in numbers])
        return {"numbers": numbers, "soft_mask": torch.arange(int(lengths.max())) < lengths[:, None]}

    def __call__(self, batch):
        assert self.casts  # as in the steps of the test
        self.read += batch["numbers"]
        soft_BK = torch.tensor(batch["numbers"], dtype=torch.float)[:, None] * batch["soft_mask"]
        return soft_BK[..., None].expand(-1, -1, 2)

    def losses(self, rows, soft_BKD, mask_BK):
        sums_B = (soft_BKD.sum(-1) * mask_BK).sum(1)
        self.answered += [row.answer[0] for row in rows]
        return [np.array([100.0 * row.answer[0], float(total)]) for row, total in zip(rows, sums_B, strict=True)]

    def answers(self, rows, limit, zeros_BKD, mask_BK):
        assert self.casts
        assert not zeros_BKD.any()
        self.asked += mask_BK.sum(1).tolist()
        return [Answer(f"zeros {int(count)}", False) for count in mask_BK.sum(1)]


def make_results(questions: list[int]) -> list[ProblemResult]:
    results = []
    for i, number in enumerate(questions):
        problem, count = Problem(f"question {number}", f"#### {i}"), LENGTHS[number % 3]
        losses = {"bridge": np.array([100.0 * i, 2.0 * number * count])}
        results.append(ProblemResult(problem, Row([0], 1, [i]), count, {"bridge": Answer(f"{i}", False)}, losses))
    return results


def add_controls(monkeypatch, questions: list[int], size: int, world: int) -> tuple[list[ProblemResult], list[Fake]]:
    """Run the part of one rank after another, and let the last one see what all have computed."""
    parts, fakes = [], [Fake(rank, world) for rank in range(world)]

    def gather(part):
        parts.append(part)
        if len(parts) < world:
            raise Ended
        return parts

    monkeypatch.setattr(controls, "gather_objects", gather)
    for fake in fakes[:-1]:
        with pytest.raises(Ended):
            controls.add_controls(fake, make_results(questions), size, "test")
    results = make_results(questions)
    controls.add_controls(fakes[-1], results, size, "test")
    return results, fakes


@pytest.mark.parametrize("questions", [list(range(1, 24)), REPEATED, [1, 2], [1, 1, 1]])
def test_controls_are_the_same_on_any_number_of_ranks(monkeypatch, questions):
    expected, (alone,) = add_controls(monkeypatch, questions, 4, 1)
    distinct = len(set(questions))
    assert len(alone.read) == (distinct if distinct > 1 else 0)  # soft tokens are made once
    assert sorted(alone.asked) == sorted({LENGTHS[number % 3] for number in questions})  # and so are answers to zeros
    for size, world in ((1, 1), (100, 1), (4, 2), (1, 3), (2, 30)):  # 30: some ranks have no part
        results, fakes = add_controls(monkeypatch, questions, size, world)
        assert sorted(chain(*(fake.read for fake in fakes))) == sorted(alone.read)
        assert max(len(fake.read) for fake in fakes) - min(len(fake.read) for fake in fakes) <= 1
        assert sorted(chain(*(fake.answered for fake in fakes))) == sorted(alone.answered)
        assert sorted(chain(*(fake.asked for fake in fakes))) == sorted(alone.asked)
        np.testing.assert_equal([vars(result) for result in results], [vars(result) for result in expected])


def test_controls_come_from_other_questions(monkeypatch):
    questions = REPEATED
    results, _ = add_controls(monkeypatch, questions, 4, 1)
    takers = {number: [] for number in questions}
    for i, result in enumerate(results):
        assert result.answers["zero"].text == f"zeros {result.soft_count}"
        other = int(result.answers["shuffled"].text)  # the index of a problem
        assert questions[other] != questions[i]
        count = LENGTHS[questions[other] % 3]
        np.testing.assert_equal(result.losses["shuffled"], [100.0 * i, 2.0 * questions[other] * count])
        takers[questions[i]].append(questions[other])
        assert result.soft_KD is None or (result.soft_KD == questions[i]).all()
    assert sorted(taken[0] for taken in takers.values()) == sorted(takers)  # each question once
    assert all(len(set(taken)) == 1 for taken in takers.values())
    assert sum(result.soft_KD is not None for result in results) == 9
    group = [(i, result) for i, result in enumerate(results) if result.candidates_G is not None]
    assert len(group) == GROUP
    assert sorted(result.own for _, result in group) == list(range(GROUP))
    for i, result in group:
        assert result.candidates_G[result.own] == -result.losses["bridge"].sum()
        sums = sorted(2.0 * questions[j] * results[j].soft_count for j, _ in group)
        assert sorted(-result.candidates_G - 100.0 * i) == sums


def test_the_draw_of_a_large_set():
    problems = [generate(0, "test", index) for index in range(700)]
    draw = Draw(problems)
    assert draw.groups_NG().shape == (DRAWN // GROUP, GROUP)
    assert len(set(draw.groups_NG().flat)) == DRAWN
    for shift in (1, 2, 8):
        others_B = draw.others_B(shift)
        assert sorted(others_B) == list(range(700))
        assert not (others_B == np.arange(700)).any()
    assert np.corrcoef(draw.order_Q, np.arange(700))[0, 1] < 0.2  # not the order of the set


@pytest.fixture
def examine(telepathy, tmp_path):
    """Return a function that tests an untrained bridge with a prefix on problems and returns measures and samples."""

    def call(problems: list[Problem], batch_size: int, **flags) -> tuple[dict[str, float], dict[str, int]]:
        data = WordProblems(eval_batch_size=batch_size, test_sets={"test": len(problems)})
        data.eval_problems = {"test": problems}
        module = telepathy(partial(TokenBridge, hidden=64), text_prefix=2, max_new_tokens=24)
        trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, **QUIET | flags)
        trainer.test(module, datamodule=data, verbose=False)
        values = {name: value.item() for name, value in trainer.callback_metrics.items()}
        return {name.removeprefix("test/"): value for name, value in values.items()}, module.counts

    return call


def test_measures_do_not_depend_on_the_batches(examine):
    problems = [problem for index in range(4) for problem in generate_twins(0, "test", index)]
    problems += [generate_passkey(0, "test", index) for index in range(6)]
    problems += problems[-2:]  # the same questions again
    expected, counts = examine(problems, 64)
    assert counts["test/accuracy"] == 16
    assert (counts["test/retrieval"], counts["test/cosine"]) == (8, 14)
    wanted = {"shuffled_accuracy", "zero_accuracy", "ce_shuffled", "ce_zero", "ce_text_prefix", "text_prefix_truncated"}
    wanted |= {"twin_consistency", "entity_transfer_key", "relative_accuracy", "recovery", "truncated"}
    assert wanted <= expected.keys()
    assert 0 < expected["text_accuracy"] < 1
    assert expected["truncated"] > 0
    for batch_size in (7, 1):
        found, _ = examine(problems, batch_size)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if not name.endswith("_ms"):
                assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_the_category_of_wrong_objects_does_not_depend_on_the_batches_or_the_order(examine, monkeypatch):
    def answers(target, rows, *of_others) -> list[Answer]:
        return [Answer(OBJECTS[sum(row.answer) % 40], False) for row in rows]

    monkeypatch.setattr(Target, "answers", answers)
    problems = [generate(0, "test", index) for index in range(40)]
    found = []
    for batch_size, order in ((40, 1), (7, -1), (1, 1)):
        values, counts = examine(problems[::order], batch_size)
        assert counts["test/category_share"] == counts["test/category_transfer"] > 30
        found.append([values[f"category_{name}"] for name in ("share", "chance", "transfer")])
    assert found[1] == found[2] == pytest.approx(found[0])
    assert 0 < found[0][0] < 1
    assert 0 < found[0][1] < 1


def test_a_single_problem_has_no_measures_of_others(examine, tmp_path):
    problems = [generate_passkey(0, "test", index) for index in range(4)]
    tried, counts = examine(problems, 2, fast_dev_run=True)
    assert counts["test/accuracy"] == counts["test/shuffled_accuracy"] == 2
    assert not list(tmp_path.iterdir())  # a dry run leaves nothing behind
    alone, _ = examine(problems[:1], 4)
    assert [file.name for file in tmp_path.rglob("*.jsonl")] == ["test.jsonl"]
    assert {"accuracy", "zero_accuracy", "truncated", "ce_zero", "bridge_gain"} <= alone.keys()
    assert not any(
        word in name for name in alone for word in ("shuffled", "specificity", "cosine", "entity", "retriev")
    )
    assert alone.keys() < tried.keys()


def test_a_target_that_is_split_over_processes_is_not_tested(examine, monkeypatch):
    monkeypatch.setattr(evaluation, "is_sharded", lambda model: True)
    with pytest.raises(UserError, match=r"model.shard_frozen is for training: set test_after_fit to false"):
        examine([generate_passkey(0, "test", 0)], 1)


def test_times_are_milliseconds_per_question(examine, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(examination, "_now", lambda device: float(next(clock)))  # each passage takes a second
    values, counts = examine([generate_passkey(0, "test", index) for index in range(3)], 2)
    assert values["soft_ms"] == values["text_ms"] == pytest.approx(2 * 1000 / 3)
    assert counts["test/soft_ms"] == 3


def test_a_later_test_leaves_no_measure_of_an_earlier_one():
    recorded = {"test/accuracy": 4, "test/retrieval": 8, "test_far/retrieval": 3}
    examination._replace(recorded, "test", {"accuracy": 1})
    assert recorded == {"test/accuracy": 1, "test_far/retrieval": 3}
