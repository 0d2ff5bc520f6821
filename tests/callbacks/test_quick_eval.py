"""Evaluation during training: the same numbers for any number of ranks, and no effect on the training."""

import json
import random
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import QUIET
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from torch import nn
from torch.utils.data import DataLoader

from callbacks.quick_eval import QuickEval
from callbacks.throughput import Throughput
from lightning_modules.core.intervals import wilson_interval
from lightning_modules.core.samples import EvalSample, text_table

HELD_OUT = 11


class Vectors(LightningDataModule):
    """Training on 16 random vectors; held-out batches of 4, other samples on each rank."""

    def __init__(self):
        super().__init__()
        self.requests = []
        self.collated = 0

    def collate(self, rows):
        self.collated += 1
        return {"id": torch.tensor(rows), "x": torch.ones(len(rows), 4)}

    def train_dataloader(self):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(x, batch_size=4, shuffle=True)

    def held_out(self, count):
        mine = range(HELD_OUT)[:count][self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=4, collate_fn=self.collate)


class WithSamples(Vectors):
    def sample_dataloader(self, count):
        self.requests.append(count)
        return self.held_out(count)


class WithValidation(Vectors):
    def val_dataloader(self):
        return self.held_out(HELD_OUT)


class Answers(LightningModule):
    """Answers numbers below 7 correctly; its evaluation draws from every random state."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.frozen = nn.Dropout(0.5).eval()
        self.evaluated = []  # (optimizer step, samples)
        self.moved = 0

    def training_step(self, batch, batch_idx):
        assert self.training
        assert self.net[2].training
        assert not self.frozen.training
        assert torch.is_grad_enabled()
        return self.net(batch).square().mean()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.moved += isinstance(batch, dict)
        return batch

    def sample_eval(self, batch):
        assert not any(module.training for module in self.modules())
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu") == (self.trainer.precision == "bf16-mixed")
        self.net(batch["x"])
        self.drawn = torch.rand(1).item(), random.random(), np.random.rand()
        ids = batch["id"].tolist()
        self.evaluated.append((self.trainer.global_step, len(ids)))
        return [self.sample(i) for i in ids]

    @staticmethod
    def sample(i):
        scores = {"accuracy": float(i < 7), "length": 2.0 + i}
        if i % 2:
            scores["odd"] = 1.0
        return EvalSample(f"What is {i}?", str(i), "same words" if i < 3 else f"{i} words", scores)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(tmp_path, *callbacks, module=None, data=None, logger=False, ckpt_path=None, **flags):
    module, data = module or Answers(), data or WithSamples()
    flags = {"max_steps": 4, "limit_val_batches": 0, "devices": 1} | flags
    trainer = Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        log_every_n_steps=1,
        **QUIET | {"logger": logger} | flags,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer, module, data


def quick(trainer):
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return {name: value for name, value in metrics.items() if name.startswith("quick_eval/")}


def samples_at(tmp_path, step):
    path = tmp_path / "samples" / f"quick_eval-{step}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_samples_and_schedule(tmp_path):
    trainer, module, data = fit(tmp_path, QuickEval(every_n_steps=2, n_samples=10))
    assert module.evaluated == [(step, size) for step in (2, 4) for size in (4, 4, 2)]
    low, high = wilson_interval(7, 10)
    assert quick(trainer) == pytest.approx(
        {
            "quick_eval/accuracy": 0.7,
            "quick_eval/accuracy_low": low,
            "quick_eval/accuracy_high": high,
            "quick_eval/length": 6.5,  # not a proportion, so no interval
            "quick_eval/odd": 1.0,  # over the five samples that have it
            "quick_eval/odd_low": wilson_interval(5, 5)[0],
            "quick_eval/odd_high": 1.0,
            "quick_eval/distinct": 0.8,
            "quick_eval/distinct_2": 0.8,
        }
    )
    for step in (2, 4):
        assert samples_at(tmp_path, step) == [asdict(Answers.sample(i)) for i in range(10)]
    assert not list(tmp_path.rglob("*.tmp"))
    # Batches are made once, and pass Lightning's transfer at each evaluation.
    assert data.requests == [10]
    assert data.collated == 3
    assert module.moved == 6


def test_takes_validation_batches_until_there_are_enough_samples(tmp_path):
    trainer, module, data = fit(tmp_path, QuickEval(2, n_samples=6), data=WithValidation())
    assert module.evaluated == [(2, 4), (2, 4), (4, 4), (4, 4)]
    assert len(samples_at(tmp_path, 4)) == 6
    assert quick(trainer)["quick_eval/accuracy"] == 1
    assert data.collated == 2


def test_the_training_is_the_same_bit_for_bit(tmp_path):
    weights, modules = [], []
    for callbacks in ([], [QuickEval(every_n_steps=1)]):
        seed_everything(3)
        _, module, _ = fit(tmp_path, *callbacks, max_steps=9)
        weights.append(module.state_dict())
        modules.append(module)
    assert not modules[0].evaluated
    assert len(modules[1].evaluated) == 9 * 3
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_random_numbers_of_an_evaluation_do_not_depend_on_the_step(tmp_path):
    drawn = []
    for max_steps in (1, 3):
        _, module, _ = fit(tmp_path, QuickEval(every_n_steps=1), max_steps=max_steps)
        drawn.append(module.drawn[0])
    assert drawn[0] == drawn[1]


def test_modes_are_restored_after_a_failure(tmp_path):
    class Broken(Answers):
        def sample_eval(self, batch):
            raise RuntimeError("out of words")

    module = Broken()
    with pytest.raises(RuntimeError, match="out of words"):
        fit(tmp_path, QuickEval(1), module=module)
    assert module.training
    assert module.net[2].training
    assert not module.frozen.training


def test_once_per_optimizer_step_under_accumulation(tmp_path):
    _, module, _ = fit(tmp_path, QuickEval(2, n_samples=4), accumulate_grad_batches=2)
    assert [step for step, _ in module.evaluated] == [2, 4]


def test_a_resumed_run_does_not_evaluate_its_first_step_again(tmp_path):
    trainer, module, _ = fit(tmp_path, QuickEval(2, n_samples=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, resumed, _ = fit(tmp_path, QuickEval(2, n_samples=4), ckpt_path=tmp_path / "last.ckpt", max_steps=7)
    assert [step for step, _ in module.evaluated] == [2, 4]
    assert [step for step, _ in resumed.evaluated] == [6]


def test_in_the_precision_of_the_trainer(tmp_path):
    _, module, _ = fit(tmp_path, QuickEval(2), precision="bf16-mixed")
    assert module.evaluated


def test_off_the_clock(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(Throughput, "pause", lambda *_: calls.append("pause"))
    monkeypatch.setattr(Throughput, "resume", lambda *_: calls.append("resume"))
    fit(tmp_path, Throughput(), QuickEval(2))
    assert calls == ["pause", "resume"] * 2


@pytest.mark.parametrize("data", [WithSamples, WithValidation])
def test_two_processes_give_the_numbers_of_one(tmp_path, data):
    strategy = "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"
    runs = []
    for ranks, flags in ((1, {}), (2, {"devices": 2, "strategy": strategy})):
        folder = tmp_path / str(ranks)
        trainer, *_ = fit(folder, QuickEval(2, n_samples=9), data=data(), max_steps=2, **flags)
        runs.append((quick(trainer), samples_at(folder, 2)))
    assert len(runs[0][1]) == 9
    assert runs[0] == runs[1]


def test_logs_to_every_logger(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="", version=""), CSVLogger(tmp_path, name="csv")]
    fit(tmp_path, QuickEval(2, n_shown=2), logger=loggers)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, round(event.value, 3)) for event in events.Scalars("quick_eval/accuracy")] == [
        (1, 0.636),
        (3, 0.636),
    ]
    table = events.Tensors("quick_eval/samples/text_summary")[1].tensor_proto.string_val[0].decode()
    assert table == text_table([Answers.sample(i) for i in (0, 5)])
    assert "quick_eval/distinct" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert len(samples_at(tmp_path, 4)) == HELD_OUT


def test_the_table_shows_texts_unchanged():
    answer = "4*5 = <<4*5=20>>20 _a_ | \\b `c` [d](e)\n#### 20 & <script>"
    table = text_table([EvalSample("Q?", answer, "", {"accuracy": 1.0, "entity_transfer": 1 / 3})])
    assert len(table.splitlines()) == 3
    html = markdown_to_safe_html(table)
    assert html.count("<td>") == 4
    for shown in ("4*5 = &lt;&lt;4*5=20&gt;&gt;20 _a_ | \\b `c` [d](e)<br>#### 20 &amp; &lt;script&gt;", "0.333"):
        assert shown in html


def test_a_fast_dev_run_writes_nothing(tmp_path):
    _, module, _ = fit(tmp_path, QuickEval(1), fast_dev_run=2)
    assert module.evaluated
    assert not list(tmp_path.iterdir())


def test_user_errors(tmp_path):
    class Silent(Answers):
        sample_eval = None

    with pytest.raises(ValueError, match="needs `sample_eval"):
        fit(tmp_path, QuickEval(), module=Silent())
    for name in ("every_n_steps", "n_samples", "n_shown"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            fit(tmp_path, QuickEval(**{name: 0}))


def test_a_score_that_the_last_samples_lack_is_no_result_of_the_run(tmp_path):
    class Once(Answers):
        def sample_eval(self, batch):
            samples = super().sample_eval(batch)
            if self.trainer.global_step > 2:
                for sample in samples:
                    sample.scores.pop("odd", None)
            return samples

    for steps, has in ((2, True), (4, False)):
        module = Once()
        fit(tmp_path, QuickEval(every_n_steps=2, n_samples=8), module=module, max_steps=steps)
        assert ("quick_eval/odd" in module.trainer.callback_metrics) is has
        assert "quick_eval/accuracy" in module.trainer.callback_metrics
