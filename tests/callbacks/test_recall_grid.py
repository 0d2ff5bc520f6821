"""The recall grid counts what a loop over queries counts, whatever the batches, ranks and stage."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import QUIET
from lightning import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import nn

from callbacks import LastCheckpoint, RecallGrid, RunRecord, recall_grid
from datamodules import Mixture, ModularArithmetic, NeedleGym
from datamodules.batch import IGNORE
from datamodules.errors import UserError
from lightning_modules.core.intervals import wilson_interval
from lightning_modules.groundthink import GroundThink
from lightning_modules.mixers.window_attention import WindowAttention
from lightning_modules.separability import Separability

SIZES = {"vocab_size": 40, "seq_len": 20, "width": 16, "window": 5, "pattern": "GS", "seed": 0}
GRID = {"needles": [2, 9], "lengths": [20, 40], "tasks": ["mqar", "multi_key"], "rows": 6, "depths": 2}


def make_data(**options) -> NeedleGym:
    sizes = {"batch_size": 4, "validation_size": 4, "test_size": 4, "seed": 0}
    return NeedleGym(**{"needles": 3, "seq_len": 20, "vocab_size": 40} | sizes | options)


class Reader(nn.Module):
    """Answers a query with its value if the needle begins in the first half of the row; else, and elsewhere, with 0.

    For a key with several values, the later a value was written the larger its logit.
    """

    def forward(self, tokens_BT):
        logits_BTV = (-0.01 * torch.arange(40)).expand(*tokens_BT.shape, -1).clone()
        for b, row in enumerate(tokens_BT.tolist()):
            for t, token in enumerate(row):
                places = [s for s in range(t) if row[s] == token and row[s + 1] >= 20]
                for rank, place in enumerate(places):
                    if 0 < token < 20 and place < len(row) / 2:
                        logits_BTV[b, t, row[place + 1]] = 1.0 + rank
        return logits_BTV


def reader() -> GroundThink:
    module = GroundThink(**SIZES)
    module.network = Reader()
    return module


def run(folder, module, grid, data=None, command="validate", **options):
    trainer = Trainer(accelerator="cpu", default_root_dir=folder, callbacks=[grid, RunRecord()], **QUIET | options)
    getattr(trainer, command)(module, datamodule=data or make_data(), **{} if command == "fit" else {"verbose": False})
    return json.loads((folder / "results.json").read_text())


def test_accuracies_by_depth_with_their_counts(tmp_path):
    record = run(tmp_path, reader(), RecallGrid(**GRID), command="test")
    lines = [json.loads(line) for line in (tmp_path / "recall" / "test-0.jsonl").read_text().splitlines()]
    assert {line["depth"] for line in lines} == {"0-50", "50-100"}
    assert all(line["accuracy"] == (line["depth"] == "0-50") for line in lines)
    assert all(line["state"] == "on" and line["window"] is None for line in lines)  # the model has neither
    for task in ("mqar", "multi_key"):
        for needles, length in ((2, 20), (2, 40), (9, 40)):  # nine do not fit into 20 tokens
            name = f"test/recall_{task}_n{needles}_t{length}"
            own = [line for line in lines if (line["task"], line["needles"], line["length"]) == (task, needles, length)]
            hits, n = sum(line["hits"] for line in own), sum(line["n"] for line in own)
            assert n == record["n"][name] == 6 * needles
            assert record["hits"][name] == [hits]
            assert record["metrics"][name] == pytest.approx(hits / n, abs=1e-5)
            assert record["intervals"][name] == pytest.approx(list(wilson_interval(hits, n)), abs=1e-5)
    assert not any("_n9_t20" in name for name in record["metrics"])
    assert record["metrics"]["test/recall_mqar_n2_t40"] == 1
    assert 0 < record["metrics"]["test/recall_multi_key_n9_t40"] < 1


def test_rulers_axes(tmp_path):
    record = run(tmp_path, reader(), RecallGrid([1], [40]))
    metrics, data = record["metrics"], make_data()
    kinds = {
        "1_1_1": {"task": "single", "needles": 1},
        "4_1_1": {"task": "multi_key", "needles": 4, "queries": 1},
        "1_4_1": {"task": "multi_value", "needles": 1, "repeats": 4},
        "1_1_4": {"task": "multi_key", "needles": 4},
    }
    for name, knobs in kinds.items():
        rows_B2T = data.tuned(knobs | {"seq_len": 40}).fixed("validation", 64)
        found = total = 0
        for tokens, labels in rows_B2T.tolist():
            for time in (t for t in range(40) if labels[t] != IGNORE):
                places = [s for s in range(40) if tokens[s] == tokens[time] and labels[s] == IGNORE]
                found, total = found + sum(place < 20 for place in places), total + len(places)
        assert record["n"][f"validation/ruler_{name}_t40"] == total == 64 * (1 if name in ("1_1_1", "4_1_1") else 4)
        assert 0.2 < metrics[f"validation/ruler_{name}_t40"] < 1
        assert record["hits"][f"validation/ruler_{name}_t40"] == [found]


def test_window_and_state(tmp_path):
    record = run(tmp_path, GroundThink(**SIZES), RecallGrid([3], [20], rows=40, ruler=False))
    name, n = "validation/recall_mqar_n3_t20", record["n"]
    assert n[name] == n[f"{name}_cleared"] == n[f"{name}_off"] == 120
    assert n[f"{name}_inside"] + n[f"{name}_outside"] == 120
    inside = 0
    for tokens, labels in make_data().fixed("validation", 40).tolist():
        for time in (t for t in range(20) if labels[t] != IGNORE):
            inside += time - (tokens.index(tokens[time]) + 1) < SIZES["window"]
    assert n[f"{name}_inside"] == inside > 0
    lines = [json.loads(line) for line in (tmp_path / "recall" / "validation-0.jsonl").read_text().splitlines()]
    assert {line["state"] for line in lines} == {"on", "cleared", "off"}
    assert sum(line["n"] for line in lines if line["state"] == "off" and line["window"] == "inside") == inside


def test_accuracies_inside_and_outside_of_the_window(tmp_path):
    module = reader()
    module.network.attention = WindowAttention(16, 2, 5)
    record = run(tmp_path, module, RecallGrid([3], [20], ["multi_key"], rows=40, ruler=False))
    hits = {"inside": [0, 0], "outside": [0, 0]}
    for tokens, labels in make_data(task="multi_key").fixed("validation", 40).tolist():
        for time in (t for t in range(20) if labels[t] != IGNORE):
            place = tokens.index(tokens[time])
            side = hits["inside" if time - (place + 1) < 5 else "outside"]
            side[0], side[1] = side[0] + (place < 10), side[1] + 1
    for side, (hit, n) in hits.items():
        name = f"validation/recall_multi_key_n3_t20_{side}"
        assert (record["hits"][name], record["n"][name]) == ([hit], n)
    assert hits["inside"][0] < hits["inside"][1]
    assert hits["outside"][0] > 0


def trainer_of(rank: int, world: int):
    return SimpleNamespace(
        global_rank=rank,
        world_size=world,
        fast_dev_run=0,
        strategy=SimpleNamespace(reduce=lambda x, reduce_op: x.clone()),
    )


def test_the_counts_depend_neither_on_batches_nor_on_ranks(monkeypatch):
    module, grid, task = reader(), RecallGrid(rows=11), make_data(task="multi_key")
    whole = grid._tally(trainer_of(0, 1), module, task, "test", "on", 4)
    found = grid._found(trainer_of(0, 1), module, task, "test")
    shares = [grid._tally(trainer_of(rank, 3), module, task, "test", "on", 4) for rank in range(3)]
    monkeypatch.setattr(recall_grid, "MOST_LOGITS", 2 * 20 * 40)  # two rows
    assert len(grid._batches(trainer_of(0, 1), module, task, "test")) == 6
    small = grid._tally(trainer_of(0, 1), module, task, "test", "on", 4)
    assert grid._found(trainer_of(0, 1), module, task, "test") == found
    assert 0 < whole[0].sum() < whole[1].sum() == 33
    for part in range(2):
        assert torch.equal(whole[part], small[part])
        assert torch.equal(whole[part], sum(share[part] for share in shares))


def fit(folder, *callbacks, steps=8, ckpt_path=None):
    options = QUIET | {"val_check_interval": 2, "check_val_every_n_epoch": None}
    options["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)
    module = GroundThink(**SIZES, warmup_steps=2)
    trainer = Trainer(accelerator="cpu", default_root_dir=folder, callbacks=[*callbacks], max_steps=steps, **options)
    trainer.fit(module, datamodule=make_data(), ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


def test_some_validations_of_a_fit_and_the_same_training(tmp_path):
    steps = []

    class Grid(RecallGrid):
        def measure(self, trainer, module, split):
            steps.append(trainer.global_step)
            super().measure(trainer, module, split)

    plain, _ = fit(tmp_path / "a")
    grid = Grid([2], [20], rows=2, every_n_steps=7)
    watched, trainer = fit(tmp_path / "b", grid)
    assert steps == [8]
    assert trainer.callback_metrics["validation/recall_mqar_n2_t20"] >= 0
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    trainer.save_checkpoint(tmp_path / "eight.ckpt")
    resumed = Grid([2], [20], rows=2, every_n_steps=7)
    fit(tmp_path / "c", resumed, steps=14, ckpt_path=tmp_path / "eight.ckpt")
    assert steps == [8, 14]
    never = Grid([2], [20])
    fit(tmp_path / "d", never)
    assert steps == [8, 14]


@pytest.mark.parametrize("step", [4, 5])
def test_a_resumed_run_measures_at_the_same_validations(step, tmp_path):
    steps = []

    class Grid(RecallGrid):
        def measure(self, trainer, module, split):
            steps.append(trainer.global_step)

    # Validations at 2, 4 and 6. A checkpoint of step 4 resumes at the validation of step 4; after a checkpoint of step
    # 5 with 5 steps between two measures, the validation at 6 is due.
    every = {4: 4, 5: 5}[step]
    saver = ModelCheckpoint(tmp_path / "all", "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path / "a", Grid(every_n_steps=every), LastCheckpoint(), saver, steps=7)
    whole, steps[:] = [*steps], []
    path = tmp_path / "all" / f"step={step}.ckpt"
    fit(tmp_path / "b", Grid(every_n_steps=every), LastCheckpoint(), steps=7, ckpt_path=path)
    assert steps == whole == [step + step % 2]


def test_a_dry_run_tries_two_rows_and_writes_nothing(tmp_path):
    options = {"accelerator": "cpu", "default_root_dir": tmp_path, "fast_dev_run": True}
    module, trainer = GroundThink(**SIZES), Trainer(callbacks=[RecallGrid()], **options)
    trainer.test(module, make_data(), verbose=False)
    assert module.counts["test/recall_mqar_n3_t20"] == 6
    assert not (tmp_path / "recall").exists()


def test_members_of_an_ensemble_and_a_member_that_diverged(tmp_path):
    grid = {"needles": [3], "lengths": [20], "rows": 30}
    ensemble = GroundThink(**SIZES, ensemble=2)
    with torch.no_grad():
        ensemble.network.unembed.weight[0] *= torch.nan
    run(tmp_path / "both", ensemble, RecallGrid(**grid))
    alone = GroundThink(**SIZES | {"seed": 1})
    run(tmp_path / "alone", alone, RecallGrid(**grid))
    names = [name for name in alone.members if "recall" in name or "ruler" in name]
    assert {"validation/recall_mqar_n3_t20_off", "validation/ruler_1_4_1_t20"} <= set(names)
    for name in names:
        assert ensemble.members[name][0].isnan(), name
        assert ensemble.members[name][1] == alone.members[name][0], name
        assert ensemble.hits[name][1] == alone.hits[name][0], name
        assert name not in ensemble.intervals
    lines = [json.loads(line) for line in (tmp_path / "both/recall/validation-0.jsonl").read_text().splitlines()]
    assert {line["hits"] is None for line in lines if line["member"] == 0} == {True}
    assert {line["hits"] is None for line in lines if line["member"] == 1} == {False}


def test_a_needle_gym_in_a_mixture_of_mixtures(tmp_path):
    inner = Mixture([make_data(seq_len=10, needles=2), make_data()], held_out=1)
    data = Mixture([inner, make_data()], held_out=1)
    record = run(tmp_path, GroundThink(**SIZES), RecallGrid(rows=2), data)
    assert "validation/recall_mqar_n2_t160" in record["metrics"]  # the first one, at 16 times its length


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "RecallGrid: `rows` must be at least 1, got 0"),
        ({"depths": 0}, "`depths` must be at least 1"),
        ({"every_n_steps": -1}, "RecallGrid.every_n_steps must be at least 0"),
        ({"lengths": []}, "RecallGrid.lengths is empty"),
        ({"lengths": [64, 0]}, r"RecallGrid: `lengths\[1\]` must be at least 1, got 0"),
        ({"needles": [-3]}, r"RecallGrid: `needles\[0\]` must be at least 1, got -3"),
        (
            {"needles": [30]},
            "RecallGrid: no point of the grid fits the data, for instance data.vocab_size 40 has 19 keys",
        ),
    ],
)
def test_mistakes_are_told_in_a_sentence(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, GroundThink(**SIZES), RecallGrid(**options), make_data(needles=3))


def test_modules_and_data_of_another_kind(tmp_path):
    arithmetic = ModularArithmetic(p=13, seed=0)
    transformer = Separability(vocab_size=40, seq_len=20, width=8, heads=2, seed=0)
    with pytest.raises(UserError, match="RecallGrid needs the task NeedleGym under data, not ModularArithmetic"):
        run(tmp_path, transformer, RecallGrid(), arithmetic)
    with pytest.raises(UserError, match="RecallGrid reads rows of 320 tokens, and the model has positions for 20"):
        run(tmp_path, transformer, RecallGrid())
    with pytest.raises(UserError, match="Two RecallGrid callbacks"):
        Trainer(accelerator="cpu", callbacks=[RecallGrid(), RecallGrid()], **QUIET).validate(transformer, make_data())
    record = run(tmp_path, transformer, RecallGrid(lengths=[20]))  # a transformer as a control
    assert "validation/recall_mqar_n3_t20" in record["metrics"]
    assert not any(name.endswith(("_off", "_inside")) for name in record["metrics"])
