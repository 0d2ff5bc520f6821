"""All tasks on rows of tokens: numbered batches, ensembles, ranks, resumed runs, inputs, user errors."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import (
    AssociativeRecall,
    InterleavedStreams,
    Mixture,
    ModularArithmetic,
    NeedleGym,
    StateTracking,
    TextCorpus,
)
from datamodules.batch import IGNORE
from datamodules.errors import UserError
from lightning_modules.groundthink import GroundThink

SMALL = {"batch_size": 4, "eval_batch_size": 4, "validation_size": 8, "test_size": 10, "seed": 5}
RECALL = SMALL | {"vocab_size": 40, "train_sets": [[16, 2, 24], [20, 4, 12]], "test_sets": [[16, 3]]}
STREAMS = SMALL | {"vocab_size": 24, "seq_len": 12, "epoch_size": 24}


def make_mixture(**options):
    sizes = SMALL | {"epoch_size": 24} | options
    return Mixture([NeedleGym(needles=2, seq_len=16, **sizes), StateTracking(train_len=9, **sizes)], epoch_batches=6)


def make_phases(**options):
    data = NeedleGym(**SMALL | {"needles": 3, "seq_len": 16, "epoch_size": 24} | options)
    data.plan([{"needles": 1, "seq_len": 7}, {}])
    data.begun = [0, 3]
    return data


TASKS = {
    **{
        f"{rule}-{interleave}": lambda rule=rule, interleave=interleave, **options: InterleavedStreams(
            **STREAMS | {"rule": rule, "interleave": interleave, "shared_vocab": interleave != "random"} | options
        )
        for rule in ("permutation", "affine", "iid")
        for interleave in ("round_robin", "random")
    },
    "repeat": lambda **options: InterleavedStreams(**STREAMS | {"rule": "repeat"} | options),
    "text": lambda **options: TextCorpus(**SMALL | {"seq_len": 12, "epoch_size": 24} | options),
    "modular": lambda **options: ModularArithmetic(
        **{"p": 7, "train_fraction": 0.5, "batch_size": 4, "validation_size": 8, "seed": 5} | options
    ),
    "recall": lambda **options: AssociativeRecall(**RECALL | options),
    "mixture": make_mixture,
    "phases": make_phases,
}


def attach(data, rank=0, world=1, **module):
    trainer = {"global_rank": rank, "world_size": world, "lightning_module": SimpleNamespace(**module)}
    data.trainer = SimpleNamespace(**trainer, overfit_batches=0, limit_train_batches=1.0)
    data.setup("fit")
    return data


def batches(data):
    return [(batch["tokens"], batch["labels"]) for batch in data.train_dataloader()]


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


class Tiny(LightningModule):
    """Learns a number and records its batches."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["tokens"], batch["labels"]))
        return (self.weight - batch["tokens"].float().mean()).square()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("name", TASKS)
def test_a_member_has_the_rows_of_an_ordinary_run_with_its_seed(name):
    members = batches(attach(TASKS[name](), ensemble=3))
    for s in range(3):
        alone = batches(attach(TASKS[name](seed=5 + s)))
        assert alone[0][0].shape[0] == 4
        assert same([(tokens[s], labels[s]) for tokens, labels in members], alone)
    assert not torch.equal(members[0][0][0], members[0][0][1])


@pytest.mark.parametrize("name", TASKS)
def test_held_out_rows_depend_neither_on_the_seed_nor_on_an_ensemble(name):
    one, other = attach(TASKS[name]()), attach(TASKS[name](seed=6), ensemble=3)
    for a, b in ((one.val_dataloader(), other.val_dataloader()), (one.test_dataloader(), other.test_dataloader())):
        a, b = ([(x["tokens"], x["labels"]) for x in loader] for loader in (a, b))
        assert same(a, b)
        assert a[0][0].ndim == 2
    assert not same(batches(one), batches(attach(TASKS[name](seed=6))))
    validation, test = (torch.cat([x["tokens"] for x in o()]) for o in (one.val_dataloader, one.test_dataloader))
    assert name == "modular" or not torch.equal(validation, test[: len(validation)])


@pytest.mark.parametrize("name", ["iid-round_robin", "permutation-random", "affine-round_robin", "recall", "phases"])
def test_training_rows_of_seed_0_are_not_the_held_out_rows(name):
    """Held-out rows have the seed 0 as well, and as many of them are drawn at once as in a batch."""
    sizes = {"batch_size": 8, "validation_size": 8, "test_size": 8}
    sets = {"train_sets": [[16, 3, 8]] * 3} if name == "recall" else {}
    data = attach(TASKS[name](seed=0, **sizes, **sets))
    rows = [tokens for tokens, _ in batches(data)]
    rows += [batch["tokens"] for loader in (data.val_dataloader(), data.test_dataloader()) for batch in loader]
    assert_all_differ(rows)


@pytest.mark.parametrize("name", ["iid-round_robin", "affine-round_robin", "mixture"])
def test_no_epoch_repeats_a_row(name):
    loader = attach(TASKS[name]()).train_dataloader()
    rows = []
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        rows += [batch["tokens"] for batch in loader]
    assert_all_differ(rows)


def assert_all_differ(rows):
    drawn = [tuple(row) for tokens in rows for row in tokens.tolist()]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("name", ["iid-round_robin", "recall"])
def test_a_device_gets_batches_of_its_evaluation_size_whatever_the_number_of_ranks(name):
    for world in (1, 2):
        data = attach(TASKS[name](test_size=16), 0, world)
        assert [len(batch["tokens"]) for batch in data.test_dataloader()] == [4] * (4 // world)


@pytest.mark.parametrize("name", ["permutation-random", "text", "modular", "recall", "mixture", "phases"])
@pytest.mark.parametrize("ensemble", [1, 3])
def test_ranks_share_the_same_global_batches(name, ensemble):
    whole = batches(attach(TASKS[name](), ensemble=ensemble))
    shares = [batches(attach(TASKS[name](batch_size=2), rank, 2, ensemble=ensemble)) for rank in range(2)]
    for number, batch in enumerate(whole):
        for part in (0, 1):
            dealt = torch.stack([share[number][part] for share in shares], dim=-2).flatten(-3, -2)
            assert torch.equal(dealt, batch[part])
    evaluated = [list(attach(TASKS[name](), rank, 2).test_dataloader()) for rank in range(2)]
    assert len({len(share) for share in evaluated}) == 1
    assert sum(len(b["tokens"]) for share in evaluated for b in share) == sum(
        len(b["tokens"]) for b in attach(TASKS[name]()).test_dataloader()
    )


@pytest.mark.parametrize(
    ("name", "workers", "limit", "stop"),
    [
        ("permutation-round_robin", 2, 1.0, 8),  # within an epoch, which has six steps without a limit
        ("modular", 0, 1.0, 6),
        ("modular", 0, 3, 6),
        ("modular", 2, 0.5, 3),
        ("modular", 0, 4, 6),
    ],
)
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(tmp_path, name, workers, limit, stop):
    def trainer(**options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_steps": 14}
        quiet["limit_train_batches"] = limit
        return Trainer(accelerator="cpu", default_root_dir=tmp_path, use_distributed_sampler=False, **quiet, **options)

    whole, resumed = Tiny(), Tiny()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(callbacks=[keep]).fit(whole, TASKS[name](num_workers=workers))
    saved = tmp_path / f"step={stop}.ckpt"
    trainer(enable_checkpointing=False).fit(resumed, TASKS[name](), ckpt_path=saved, weights_only=True)
    assert same(resumed.seen, whole.seen[stop:])
    assert torch.equal(resumed.weight, whole.weight)


def test_workers_make_the_same_batches():
    make = TASKS["affine-random"]
    assert same(batches(attach(make(num_workers=2), ensemble=2)), batches(attach(make(), ensemble=2)))


def test_the_default_seed_is_the_seed_of_the_run():
    seed_everything(11, verbose=False)
    assert TASKS["iid-random"](seed=None).seed == 11


def test_epochs_draw_new_rows_and_labels_are_the_next_tokens():
    data = attach(TASKS["iid-round_robin"]())
    loader = data.train_dataloader()
    first = next(iter(loader))
    loader.sampler.set_epoch(1)
    assert not torch.equal(first["tokens"], next(iter(loader))["tokens"])
    assert torch.equal(first["tokens"][:, 1:], first["labels"][:, :-1])
    assert first["tokens"].dtype == first["labels"].dtype == torch.int64


def test_chance_and_ceiling_are_reported_once(monkeypatch):
    messages = []
    monkeypatch.setattr("datamodules.sequence_task.rank_zero_info", messages.append)
    data = attach(TASKS["iid-round_robin"]())
    data.setup("test")
    assert messages == ["InterleavedStreams: chance is 0.04167, the best possible accuracy 0.04167"]


def test_inputs_are_one_padded_batch():
    data = attach(TASKS["iid-round_robin"](inputs=["3 4 5", "7"]))
    (batch,) = data.predict_dataloader()
    assert batch["tokens"].tolist() == [[3, 4, 5], [7, 0, 0]]
    assert batch["labels"].tolist() == [[4, 5, IGNORE], [IGNORE] * 3]
    assert data.decode([3, 4]) == "3 4"
    (shown,) = attach(TASKS["iid-round_robin"](eval_batch_size=8)).predict_dataloader()
    assert np.array_equal(shown["tokens"], data._held_out["test"][:8, 0])


@pytest.mark.parametrize("text", ["", "x", "24", "-1", " ".join("1" * 13)])
def test_inputs_that_do_not_fit_the_task(text):
    with pytest.raises(ValueError, match=r"data.inputs: '.*'"):
        attach(TASKS["iid-round_robin"](inputs=["1", text])).predict_dataloader()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 0}, "data.batch_size must be at least 1, not 0"),
        ({"eval_batch_size": 0}, "data.eval_batch_size must be at least 1"),
        ({"validation_size": 0}, "data.validation_size must be at least 1"),
        ({"test_size": 0}, "data.test_size must be at least 1"),
        ({"num_workers": 3}, "data.num_workers must be 0, 1, 2, 4 or 8"),
        ({"epoch_size": 3}, r"data.epoch_size \(3\) is smaller than data.batch_size \(4\)"),
        ({"seed": -1}, "data.seed must be at least 0"),
        ({"inputs": []}, "data.inputs is empty"),
    ],
)
def test_user_errors(options, reason):
    with pytest.raises(ValueError, match=reason):
        TASKS["iid-round_robin"](**options)


def test_too_many_devices():
    data = attach(TASKS["iid-round_robin"](), 0, 8)
    with pytest.raises(ValueError, match=r"data.epoch_size \(24\) is smaller than a batch of all devices \(32\)"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="8 validation rows in 1 batches leave some of 16 devices without any"):
        attach(TASKS["iid-round_robin"](), 0, 16).val_dataloader()


def test_predictions_end_where_an_input_ends(tmp_path):
    data = NeedleGym(needles=2, seq_len=16, vocab_size=20, inputs=["1 10 1", "1 10 2 11 2 1"])
    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir=tmp_path)
    trainer.predict(GroundThink(20, 16, width=16, heads=2, seed=0), datamodule=data)
    lines = map(json.loads, (tmp_path / "predictions" / "positions-0.jsonl").read_text().splitlines())
    assert [(line["input"], line["position"]) for line in lines] == [(0, t) for t in range(3)] + [
        (1, t) for t in range(6)
    ]
    (batch,) = data.predict_dataloader()
    assert batch["lengths"].tolist() == [3, 6]
    assert batch["labels"][0].tolist() == [IGNORE, IGNORE, 10, IGNORE, IGNORE, IGNORE]


def test_a_number_of_thousands_of_digits_is_told_in_a_sentence():
    with pytest.raises(UserError, match="is not a row of numbers from 0 to 19"):
        NeedleGym(needles=2, vocab_size=20).parse(5000 * "9")
    assert NeedleGym(needles=2, vocab_size=20).parse(f"0019 {5000 * '0'}") == [19, 0]
