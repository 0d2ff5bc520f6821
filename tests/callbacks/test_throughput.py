"""Rates count the time of training only, and all ranks."""

import time

import pytest
import torch
from conftest import QUIET
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from callbacks.throughput import Throughput, off_the_clock
from lightning_modules.core.contracts import Workload

STEP_S = 0.02
BATCH = 4
LENGTH = 5


class Sequences(Dataset):
    def __init__(self, n, wait_s=0.0):
        self.n = n
        self.wait_s = wait_s

    def __len__(self):
        return self.n * BATCH

    def __getitem__(self, i):
        if i % BATCH == 0:
            time.sleep(self.wait_s)
        return {"name": "x", "tokens": torch.zeros(LENGTH, dtype=torch.long)}


class Sleeper(LightningModule):
    """Sleeps STEP_S in each step."""

    def __init__(self, validation_s=0.0):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.validation_s = validation_s

    def training_step(self, batch, batch_idx):
        time.sleep(STEP_S)
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        time.sleep(self.validation_s)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WithWorkload(Sleeper):
    def workload(self, batch):
        return Workload(samples=7, tokens=11, flops=1000, padding=self.layer.in_features)


class Recorder(Logger):
    """Keeps logged rates with their steps."""

    name = "recorder"
    version = 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        if "throughput/samples_per_s" in metrics:
            self.rows.append((step, metrics))

    def log_hyperparams(self, *_, **__):
        pass


def fit(module, tmp_path, *callbacks, n=10, wait_s=0.0, logger=False, ckpt_path=None, **flags):
    flags = {"max_epochs": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0, "log_every_n_steps": 3} | flags
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        **QUIET | {"logger": logger} | flags,
    )
    data = DataLoader(Sequences(n, wait_s), batch_size=BATCH)
    trainer.fit(module, data, DataLoader(Sequences(2), batch_size=BATCH), ckpt_path=ckpt_path)
    return trainer, {name: value.item() for name, value in trainer.callback_metrics.items()}


def assert_training_speed(metrics, samples=BATCH, slack=0.45):
    """The sleep bounds the rate from above; on a busy machine it is somewhat lower."""
    fastest = samples / STEP_S
    assert slack * fastest < metrics["throughput/samples_per_s"] <= fastest


def test_rates_by_shape_without_workload(tmp_path):
    _, metrics = fit(Sleeper(), tmp_path, Throughput())
    assert_training_speed(metrics)
    assert metrics["throughput/tokens_per_s"] == pytest.approx(LENGTH * metrics["throughput/samples_per_s"])
    assert metrics["throughput/data_wait"] < 0.3
    assert 0.05 < metrics["throughput/peak_memory_gib"] < 100
    assert not {"throughput/mfu", "throughput/padding"} & {*metrics}


def test_rates_by_workload(tmp_path):
    _, metrics = fit(WithWorkload(), tmp_path, Throughput(peak_flops=1e6))
    assert_training_speed(metrics, samples=7)
    rate = metrics["throughput/samples_per_s"]
    assert metrics["throughput/tokens_per_s"] == pytest.approx(11 / 7 * rate)
    assert metrics["throughput/mfu"] == pytest.approx(1000 / 7 * rate / 1e6)
    assert metrics["throughput/padding"] == pytest.approx(1 / 11)


def test_no_utilisation_without_a_known_peak(tmp_path):
    _, metrics = fit(WithWorkload(), tmp_path, Throughput())
    assert "throughput/mfu" not in metrics


def test_data_wait(tmp_path):
    _, metrics = fit(Sleeper(), tmp_path, Throughput(), wait_s=STEP_S)
    assert 0.3 < metrics["throughput/data_wait"] < 0.7


class Evaluates(Callback):
    """Evaluates for a long time during training, off the clock."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        with off_the_clock(trainer), off_the_clock(trainer):
            time.sleep(3 * STEP_S)


@pytest.mark.parametrize("evaluation_first", [True, False])
def test_validation_and_evaluation_are_off_the_clock(evaluation_first, tmp_path):
    callbacks = [Throughput(), Evaluates()]
    callbacks = callbacks[::-1] if evaluation_first else callbacks
    flags = {"limit_val_batches": 2, "num_sanity_val_steps": 1, "val_check_interval": 2}
    trainer, metrics = fit(Sleeper(validation_s=2 * STEP_S), tmp_path, *callbacks, **flags)
    assert trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.completed > 0
    assert_training_speed(metrics)
    assert metrics["throughput/data_wait"] < 0.3


@pytest.mark.parametrize(("every_n_steps", "steps"), [(None, [2, 5, 8]), (4, [3, 7])])
def test_logs_once_per_interval(every_n_steps, steps, tmp_path):
    logger = Recorder()
    fit(Sleeper(), tmp_path, Throughput(every_n_steps), logger=logger)
    assert [step for step, _ in logger.rows] == steps
    for _, metrics in logger.rows:
        assert_training_speed(metrics)


def test_intervals_are_optimizer_steps_under_accumulation(tmp_path):
    logger = Recorder()
    fit(Sleeper(), tmp_path, Throughput(2), logger=logger, accumulate_grad_batches=2, n=8)
    assert [step for step, _ in logger.rows] == [1, 3]
    for _, metrics in logger.rows:
        assert_training_speed(metrics)


def test_a_resumed_run_counts_from_its_start(tmp_path):
    first, _ = fit(Sleeper(), tmp_path, Throughput(), n=5)
    first.save_checkpoint(tmp_path / "first.ckpt")
    logger = Recorder()
    trainer, metrics = fit(
        Sleeper(), tmp_path, Throughput(), n=5, logger=logger, max_epochs=2, ckpt_path=tmp_path / "first.ckpt"
    )
    assert trainer.global_step == 10
    assert [step for step, _ in logger.rows] == [8]
    for rates in (logger.rows[0][1], metrics):
        assert_training_speed(rates)


def test_logs_to_a_logger_of_lightning(tmp_path):
    fit(Sleeper(), tmp_path, Throughput(), logger=CSVLogger(tmp_path, name="", version=""))
    assert "throughput/samples_per_s" in (tmp_path / "metrics.csv").read_text()


def test_a_run_of_one_batch_logs_nothing(tmp_path):
    _, metrics = fit(Sleeper(), tmp_path, Throughput(), n=1)
    assert metrics == {}


def test_user_errors():
    with pytest.raises(ValueError, match="`every_n_steps`"):
        Throughput(0)
    with pytest.raises(ValueError, match="`peak_flops` must be positive"):
        Throughput(peak_flops=-1.0)
