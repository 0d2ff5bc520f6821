"""Mixture: batches of one task each, by weight; phases of a tunable task."""

from types import SimpleNamespace

import pytest
import torch

from datamodules import Mixture, NeedleGym, StateTracking, TextCorpus
from datamodules.errors import UserError

SIZES = {"batch_size": 4, "validation_size": 6, "test_size": 6}


def make(seed=0, workers=0, **options):
    tasks = [
        NeedleGym(needles=2, seq_len=16, vocab_size=20, seed=seed, **SIZES),
        StateTracking("S3", train_len=5, test_len=9, seed=seed, **SIZES | {"batch_size": 2}),
        TextCorpus(seq_len=7, seed=seed, **SIZES),
    ]
    data = Mixture(tasks, **{"weights": [3, 1, 0], "epoch_batches": 40, "num_workers": workers} | options)
    module = SimpleNamespace(ensemble=1)
    data.trainer = SimpleNamespace(
        global_rank=0, world_size=1, overfit_batches=0, limit_train_batches=1.0, lightning_module=module
    )
    data.setup("fit")
    return data


def shapes(loader):
    return [tuple(batch["tokens"].shape) for batch in loader]


def test_each_batch_is_of_one_task_by_weight():
    data = make(epoch_batches=1000)
    seen = shapes(data.train_dataloader())
    assert set(seen) == {(4, 16), (2, 5)}
    assert abs(seen.count((4, 16)) - 750) < 4 * (1000 * 0.75 * 0.25) ** 0.5
    assert (data.vocab_size, data.seq_len) == (256, 16)
    assert shapes(make(epoch_batches=1000, seed=1).train_dataloader()) == seen  # members of an ensemble agree
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    assert shapes(loader) != seen


def test_one_task_is_held_out():
    first, second = make(), make(held_out=1)
    assert (first.chance, first.ceiling) == (1 / 10, 1)
    assert second.chance == 1 / 6
    assert shapes(first.val_dataloader()) == shapes(first.test_dataloader()) == [(6, 16)]
    assert (shapes(second.val_dataloader()), shapes(second.test_dataloader())) == ([(6, 5)], [(6, 9)])
    assert second.parse("0 5") == [0, 5]
    (shown,) = make(held_out=1).predict_dataloader()
    assert shown["tokens"].shape == (6, 9)


def test_the_vocabularies_of_texts_are_in_checkpoints(tmp_path):
    def mixture(characters: str, count: int = 1) -> Mixture:
        path = tmp_path / "text.txt"
        path.write_text(characters * 400)
        task = TextCorpus("file", str(path), level="char", seq_len=7, **SIZES)
        return Mixture([NeedleGym(needles=2, seq_len=16, vocab_size=20, **SIZES), *[task] * count])

    before = mixture("abc")
    state, vocab_size = before.state_dict(), before.tasks[1].vocab_size
    after = mixture("abcxyz")  # the text has changed since
    after.load_state_dict(state)
    assert after.tasks[1].parse("cx") == before.tasks[1].parse("cx")
    assert after.tasks[1].vocab_size == vocab_size == 4
    with pytest.raises(UserError, match=r"data\.tasks: there are 3, and the checkpoint was trained on 2"):
        mixture("abc", 2).load_state_dict(state)


PHASES = [{"needles": 1, "seq_len": 8}, {"weights": [1, 1, 0], "train_len": 3}, {}]


def test_the_number_of_a_batch_decides_its_phase():
    data = make()
    data.plan(PHASES)
    data.begun = [0, 10, 25]
    seen = shapes(data.train_dataloader())
    assert [set(seen[:10]), set(seen[10:25]), set(seen[25:])] == [
        {(4, 8), (2, 5)},
        {(4, 16), (2, 3)},
        {(4, 16), (2, 5)},
    ]
    assert seen[25:] == shapes(make().train_dataloader())[25:]
    assert shapes(data.val_dataloader()) == [(6, 16)]
    assert shapes(data.test_dataloader()) == [(6, 16)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_phase_begins_with_the_first_batch_that_is_not_prepared_yet(workers):
    data = make(workers=workers)
    data.plan(PHASES)
    validation, loader = data.val_dataloader(), iter(data.train_dataloader())
    assert shapes(validation) == [(6, 8)]
    before = [next(loader) for _ in range(5)]
    data.advance(5)
    assert data.begun == [0, 5 + 4 * workers]
    assert shapes(validation) == [(6, 16)]
    after = [*before, *loader]
    resumed = make()
    resumed.plan(PHASES)
    resumed.begun = data.begun
    for one, other in zip(after, resumed.train_dataloader(), strict=True):
        assert torch.equal(one["tokens"], other["tokens"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weights": [1]}, "data.weights has 1 numbers for 3 tasks"),
        ({"weights": [0, 0, 0]}, "data.weights are all 0"),
        ({"weights": [1, -1, 0]}, r"data.weights\[1\] must be at least 0"),
        ({"held_out": 3}, "data.held_out must be at most 2"),
    ],
)
def test_user_errors(options, reason):
    with pytest.raises(ValueError, match=reason):
        make(**options)


def test_a_phase_may_not_have_longer_rows_than_the_data():
    with pytest.raises(UserError, match=r"^Curriculum.phases\[1\]: its seq_len is 17, and the data has 16, which no"):
        make().plan([{}, {"seq_len": 17}])


def test_no_task():
    with pytest.raises(ValueError, match=r"data.tasks is empty"):
        Mixture([])
