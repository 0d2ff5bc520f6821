"""The monitor warns of a collapse once, or stops the run; a healthy site passes."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib import pyplot
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from callbacks import diversity_monitor
from callbacks.diversity_monitor import DiversityMonitor
from datamodules.errors import UserError
from lightning_modules.core.diversity import between_input_variance, effective_rank, mean_pairwise_cosine

COLLAPSE = "nearly the same for every input"


class Bridge(nn.Module):
    """Adds one offset for all inputs to `spread` times the input; the last position is padding."""

    def __init__(self, masked):
        super().__init__()
        self.offset = nn.Parameter(torch.ones(3, 4))
        self.spread = 1.0
        self.masked = masked

    def forward(self, x_BKD):
        soft_BKD = self.offset + self.spread * x_BKD
        if not self.masked:
            return soft_BKD
        mask_BK = torch.arange(3).expand(len(x_BKD), 3) < 2
        return soft_BKD.masked_fill(~mask_BK[..., None], torch.nan), mask_BK


class Sender(LightningModule):
    """Sends inputs through the bridge; `spreads` gives the spread by optimizer step."""

    def __init__(self, spreads=None, masked=False):
        super().__init__()
        self.bridge = Bridge(masked)
        self.unused = nn.Linear(1, 1)
        self.spreads = spreads
        self.outputs = []

    def spread(self, step):
        return 1.0 if self.spreads is None else self.spreads(step)

    def send(self, x_BKD):
        soft = self.bridge(x_BKD)
        return soft[0].where(soft[1][..., None], 0.0) if isinstance(soft, tuple) else soft

    def training_step(self, batch, batch_idx):
        self.bridge.spread = self.spread(self.trainer.global_step)
        soft_BKD = self.send(batch)
        self.outputs.append(soft_BKD.detach().clone())
        with torch.no_grad():
            self.eval()
            self.send(torch.zeros_like(batch))  # the monitor ignores generation inside the step
            self.train()
        return 1e-3 * soft_BKD.square().mean()

    def validation_step(self, batch, batch_idx):
        self.send(torch.zeros_like(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Log(Callback):
    """Keeps the monitor's values by optimizer step; acts as QuickEval at step 4."""

    def __init__(self):
        self.rows = {}

    def on_train_batch_end(self, trainer, *_):
        metrics = trainer.callback_metrics
        found = {name: metrics.pop(name).item() for name in list(metrics) if name.startswith("diversity/")}
        if found:
            self.rows[trainer.global_step] = found
        if trainer.global_step == 4:
            metrics["quick_eval/distinct"] = torch.tensor(0.25)


def fit(tmp_path, monitor, module=None, logger=False, batch_size=8, ckpt_path=None, **flags):
    module, log = module or Sender(), Log()
    flags = {"max_steps": 6, "limit_val_batches": 0, "num_sanity_val_steps": 0, "devices": 1} | flags
    flags = {"enable_checkpointing": False} | flags
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[monitor, log],
        default_root_dir=tmp_path,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        **flags,
    )
    loader = DataLoader(torch.randn(64, 3, 4, generator=torch.Generator().manual_seed(0)), batch_size=batch_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    messages = [str(warning.message) for warning in caught]
    return trainer, log.rows, [text for text in messages if COLLAPSE in text or "nothing to measure" in text]


@pytest.mark.parametrize("masked", [False, True])
def test_logs_the_measures_of_the_training_batch(tmp_path, masked):
    module = Sender(masked=masked)
    _, rows, warned = fit(tmp_path, DiversityMonitor(every_n_steps=2), module)
    assert list(rows) == [2, 4, 6]
    assert not warned
    for step, row in rows.items():
        soft_BKD = module.outputs[step - 1]
        real_BKD = soft_BKD[:, :2] if masked else soft_BKD
        assert row["diversity/cosine"] == pytest.approx(mean_pairwise_cosine(soft_BKD.flatten(1)).item())
        assert row["diversity/between_input_variance"] == pytest.approx(between_input_variance(real_BKD).item())
        assert row["diversity/effective_rank"] == pytest.approx(effective_rank(real_BKD.flatten(1)).item(), rel=1e-5)
        assert row.get("diversity/distinct") == (0.25 if step > 4 else None)


def test_counts_optimizer_steps_and_continues_after_a_resumption(tmp_path):
    module = Sender()
    flags = {"accumulate_grad_batches": 2}
    trainer, rows, _ = fit(tmp_path, DiversityMonitor(every_n_steps=3), module, **flags)
    assert list(rows) == [3, 6]
    cosine = mean_pairwise_cosine(module.outputs[2 * 3 - 1].flatten(1)).item()  # the last micro-batch
    assert rows[3]["diversity/cosine"] == pytest.approx(cosine)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, rows, _ = fit(
        tmp_path, DiversityMonitor(every_n_steps=3), ckpt_path=tmp_path / "last.ckpt", max_steps=10, **flags
    )
    assert list(rows) == [9]


def test_keeps_nothing_on_other_steps(tmp_path, monkeypatch):
    captures = []
    monkeypatch.setattr(diversity_monitor, "_values_and_mask", lambda output, site: captures.append(1))
    fit(tmp_path, DiversityMonitor(every_n_steps=3), max_steps=8)
    assert len(captures) == 2


def test_warns_once_per_collapse(tmp_path):
    spreads = lambda step: 1.0 if step == 5 else 1e-3  # noqa: E731
    trainer, _, warned = fit(tmp_path, DiversityMonitor(every_n_steps=1, patience=2), Sender(spreads), max_steps=9)
    assert trainer.global_step == 9
    assert len(warned) == 2
    assert "'bridge'" in warned[0]
    assert "step 2:" in warned[0]
    assert "step 8:" in warned[1]


@pytest.mark.parametrize("limits", [{"min_variance": 0.0}, {"max_cosine": 1.1}])
def test_either_limit_is_enough(tmp_path, limits):
    monitor = DiversityMonitor(every_n_steps=1, **limits)
    assert fit(tmp_path, monitor, Sender(lambda step: 1e-3))[2]
    assert not fit(tmp_path, DiversityMonitor(every_n_steps=1, max_cosine=1.1, min_variance=0.0), Sender(lambda _: 0))[
        2
    ]


def test_a_single_bad_check_is_no_collapse(tmp_path):
    spreads = lambda step: 1e-3 if step % 3 else 1.0  # noqa: E731
    _, _, warned = fit(tmp_path, DiversityMonitor(every_n_steps=1, patience=3), Sender(spreads), max_steps=8)
    assert not warned


class HalfCollapsed(Sender):
    """Collapses on rank 0 only; carries the last step out of the process in a buffer."""

    def __init__(self):
        super().__init__()
        del self.unused  # DDP requires that every parameter is used
        self.register_buffer("step", torch.tensor(0))

    def spread(self, step):
        return float(self.trainer.global_rank)

    def on_train_batch_end(self, *_):
        self.step.fill_(self.trainer.global_step)


def test_stops_the_run(tmp_path):
    monitor = DiversityMonitor(every_n_steps=1, on_collapse="stop", patience=2)
    trainer, _, warned = fit(tmp_path, monitor, Sender(lambda step: 1e-3))
    assert trainer.global_step == 2
    assert len(warned) == 1


def test_a_resumed_run_stops_where_the_uninterrupted_run_does(tmp_path):
    path = tmp_path / "three.ckpt"

    class Saving(Sender):
        def on_train_batch_end(self, *_):
            if self.trainer.global_step == 3 and not path.exists():
                self.trainer.save_checkpoint(path)

    for ckpt_path in (None, path):
        monitor = DiversityMonitor(every_n_steps=1, on_collapse="stop", patience=4)
        trainer, _, warned = fit(tmp_path, monitor, Saving(lambda step: 1e-3), max_steps=9, ckpt_path=ckpt_path)
        assert trainer.global_step == 4
        assert len(warned) == 1


@pytest.mark.parametrize(("min_variance", "stops_at"), [(0.4, 2), (0.1, 6)])
def test_two_processes_decide_by_their_mean(tmp_path, min_variance, stops_at):
    # The variances are 0 and about 1/2. If each rank decided by itself, one would stop and the other wait for ever.
    strategy = "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"
    monitor = DiversityMonitor(
        every_n_steps=1, on_collapse="stop", patience=2, max_cosine=1.1, min_variance=min_variance
    )
    module = HalfCollapsed()
    fit(tmp_path, monitor, module, devices=2, strategy=strategy, enable_checkpointing=True)
    assert module.step == stops_at


def test_a_step_without_outputs_is_no_collapse(tmp_path):
    monitor = DiversityMonitor("unused", every_n_steps=1, on_collapse="stop", patience=1)
    trainer, rows, warned = fit(tmp_path, monitor)
    assert trainer.global_step == 6
    assert not rows
    assert len(warned) == 1
    assert "'unused' must be called" in warned[0]
    for module, batch_size in ((Sender(lambda step: float("nan")), 8), (Sender(), 1)):
        _, rows, warned = fit(tmp_path, DiversityMonitor(every_n_steps=1, patience=1), module, batch_size=batch_size)
        assert not rows
        assert len(warned) == 1


def test_figure_at_validation_and_at_the_end(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="", version=""), CSVLogger(tmp_path, name="csv")]
    flags = {"limit_val_batches": 1, "val_check_interval": 3, "num_sanity_val_steps": 1, "max_steps": 7}
    fit(tmp_path, DiversityMonitor(every_n_steps=1), logger=loggers, **flags)
    images = EventAccumulator(str(tmp_path)).Reload().Images("diversity/cosine_matrix")
    assert [image.step for image in images] == [2, 5, 6]
    assert all(image.width > 100 for image in images)
    assert not pyplot.get_fignums()


def test_figure_shows_the_matrix_with_a_labelled_colour_bar():
    matrix = torch.eye(3) * 2 - 1
    axes, bar = diversity_monitor.figure(matrix).axes
    assert bar.get_ylabel() == "cosine"
    (image,) = axes.images
    assert torch.equal(torch.tensor(image.get_array()), matrix)
    assert image.get_clim() == (-1, 1)


def test_hooks_and_tensors_are_released(tmp_path):
    class Fails(Sender):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("lost")

    monitor, module = DiversityMonitor(every_n_steps=1), Sender()
    fit(tmp_path, monitor, module)
    assert not module.bridge._forward_hooks
    failed = Fails()
    with pytest.raises(RuntimeError, match="lost"):
        fit(tmp_path, monitor, failed)
    assert not failed.bridge._forward_hooks
    assert monitor._captured is None
    assert monitor._matrix is None


def test_user_errors(tmp_path):
    for name in ("every_n_steps", "patience"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            fit(tmp_path, DiversityMonitor(**{name: 0}))
    with pytest.raises(ValueError, match="matches 'bridge', 'unused'"):
        fit(tmp_path, DiversityMonitor("*"))
    with pytest.raises(ValueError, match="nearest names are: 'bridge'"):
        fit(tmp_path, DiversityMonitor("brigde"))


def test_an_ensemble_is_refused():
    module = Sender()
    module.ensemble = 2
    with pytest.raises(UserError, match=r"^DiversityMonitor reads a single model: set model\.ensemble to 1, not 2$"):
        DiversityMonitor().setup(Trainer(barebones=True, callbacks=[]), module, "fit")
