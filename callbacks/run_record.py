"""The record of a run."""

import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from callbacks.divergence import Diverged
from callbacks.hyperparameters import log_end, log_settings, main_settings
from callbacks.provenance import git_state, hardware, run_seed, versions
from lightning_modules.core.contracts import HasCounts, HasMembers
from lightning_modules.core.files import replacing
from lightning_modules.core.reporting import ensemble_size, is_dry_run, log_last_losses
from lightning_modules.core.signals import Interrupted

FIT = TrainerFn.FITTING.value
MEASURED = ("metrics", "intervals", "n", "hits")  # the parts of the record that are measures; ensembles have `members`


class RunRecord(Callback):
    """Writes `results.json` into the run's folder: the command, its environment, its duration and its metrics.

    The file exists from the start (`status: running`) and is replaced as a whole after every stage, so a killed run
    still has its last state. The other values of `status` are `finished`, `interrupted` (by a signal), `diverged` (with
    the `step` and the `reason`, and without metrics) and `failed`. Beside the metrics it has `intervals`, `n` (number
    of samples) and `hits` (hits of a proportion, one number per ensemble member), if the module keeps them
    (`HasCounts`). For an ensemble, `members` has the value of each measure for every member, in order of their seeds,
    and `members.jsonl` has these values at every validation. NaN and infinity become null.

    Checkpoints hold the config (`config`) and the record so far: a resumed run continues the durations, and keeps the
    metrics that it does not measure again. The config goes to every logger as hyperparameters. TensorBoard's HPARAMS
    tab gets the main settings, see `callbacks.hyperparameters`, and shows them beside the run's scalars. The command
    line adds this callback to every run.

    Example::

        Trainer(callbacks=[RunRecord(command=sys.argv[1:], config={"model": {"width": 64}})])

    Args:
        command: The command line, without the program's name.
        configs: Paths of the config files.
        config: The resolved config, as plain types.

    Attributes:
        record: The content of the file.
        path: The file; None before the first stage, and on ranks other than zero.
        test_follows: Whether a test follows fit, so that fit is not the end of the run.
        trained: Whether training has begun.
    """

    def __init__(
        self, command: Sequence[str] = (), configs: Sequence[str] = (), config: dict[str, Any] | None = None
    ) -> None:
        self.configs = list(configs)
        self.config = config or {}
        self.record: dict[str, Any] = {"status": "running", "command": list(command), "configs": self.configs}
        self.record |= {"seconds": {}, "steps": 0} | {key: {} for key in MEASURED}
        self.path: Path | None = None
        self.test_follows = False
        self.trained = False
        self._started = time.monotonic()
        self._seconds_before = 0.0  # of the fit, in the attempts that this one continues
        self._logged_settings = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the record as it is before the stage, and log the config."""
        self._open(trainer, trainer.log_dir)  # on all ranks, because log_dir is a collective
        self._started = time.monotonic()
        self.record["status"] = "running"
        if self.path and self.config:
            self._log_settings(trainer, stage)
        self._write()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that training has begun."""
        self.trained = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the loggers the losses of the last step of a run that was stopped early."""
        log_last_losses(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add the duration, the metrics, and the samples behind them."""
        ends = stage != "fit" or not self.test_follows
        self._add_metrics(trainer, pl_module)
        self._update(trainer, stage, "finished" if ends else "running")
        self._write()
        if self.path and self.config and ends:
            log_end(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the config and the record so far to a checkpoint."""
        self._add_metrics(trainer, pl_module)
        checkpoint["config"] = self.config
        state = {key: self.record[key] for key in (*MEASURED, "members") if key in self.record}
        checkpoint["callbacks"][self.state_key] = state | {"seconds": self._seconds(FIT)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue the record of the run that a fit resumes."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state and trainer.state.fn == TrainerFn.FITTING:
            self._seconds_before = float(state["seconds"])
            self.record |= {key: dict(state[key]) for key in (*MEASURED, "members") if key in state}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a line with the values of every member of an ensemble."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self.path and fitting and ensemble_size(pl_module) > 1:
            with open(self.path.with_name("members.jsonl"), "a") as file:
                file.write(json.dumps({"step": trainer.global_step} | _by_member(pl_module)) + "\n")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Record how the run ended; the metrics of finished stages stay, unless the run has diverged."""
        self._open(trainer, trainer.default_root_dir)  # the setup of a datamodule may fail before that of callbacks
        if isinstance(exception, Diverged):
            self.record |= {key: {} for key in MEASURED} | {"step": exception.step, "reason": exception.reason}
            self.record.pop("members", None)
        stage = trainer.state.fn.value if trainer.state.fn else FIT
        self._update(trainer, stage, _ending(exception))
        with suppress(OSError):  # the disk may be full, which may be the exception
            self._write()

    def end(self, status: str) -> None:
        """Record the end of a run whose process ends at once."""
        self.record["status"] = status
        self._write()

    def _open(self, trainer: Trainer, folder: str | None) -> None:
        if self.path or is_dry_run(trainer) or not trainer.is_global_zero:
            return
        self.path = Path(folder or trainer.default_root_dir, "results.json")
        self.record |= {"seed": run_seed(), "git": git_state(), "versions": versions(), "hardware": hardware(trainer)}

    def _log_settings(self, trainer: Trainer, stage: str) -> None:
        if not self._logged_settings:
            log_settings(trainer, main_settings(self.config) | {"precision": str(trainer.precision)})
            self._logged_settings = True
        if stage == "fit":
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.hparams.update(self.config)  # for `hparams.yaml`
                else:
                    logger.log_hyperparams(self.config)

    def _update(self, trainer: Trainer, stage: str, status: str) -> None:
        self.record["status"] = status
        self.record["seconds"][stage] = self._seconds(stage)
        self.record["steps"] = trainer.global_step

    def _seconds(self, stage: str) -> float:
        before = self._seconds_before if stage == FIT else 0.0
        return round(before + time.monotonic() - self._started, 3)

    def _add_metrics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics  # on all ranks, because it may synchronise metrics
        self.record["metrics"] |= {name: _finite(value) for name, value in metrics.items() if value.numel() == 1}
        if isinstance(pl_module, HasCounts):
            for name, (low, high) in pl_module.intervals.items():
                self.record["intervals"][name] = [_finite(low), _finite(high)]
            self.record["n"] |= {name: int(count) for name, count in pl_module.counts.items()}
            self.record["hits"] |= {name: [int(hit) for hit in hits] for name, hits in pl_module.hits.items()}
        if members := _by_member(pl_module):
            self.record["members"] = self.record.get("members", {}) | members

    def _write(self) -> None:
        if self.path is not None:
            with replacing(self.path) as draft:
                draft.write_text(json.dumps(self.record, indent=2, allow_nan=False) + "\n")

    def table(self) -> str:
        """Return the final metrics as a table: value, and 95 % interval and n where they are known."""
        metrics = {
            name: value for name, value in self.record["metrics"].items() if not name.endswith(("_low", "_high"))
        }
        rows = [("metric", "value", "95 % interval", "n")]
        for name, value in metrics.items():
            interval = self.record["intervals"].get(name)
            known = interval and None not in interval
            between = " to ".join(f"{end:.4g}" for end in interval) if known else ""
            rows.append((name, "-" if value is None else f"{value:.4g}", between, str(self.record["n"].get(name, ""))))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [f"{n:<{widths[0]}}  {v:>{widths[1]}}  {i:>{widths[2]}}  {c:>{widths[3]}}" for n, v, i, c in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _ending(exception: BaseException) -> str:
    if isinstance(exception, Interrupted | KeyboardInterrupt | SIGTERMException):
        return "interrupted"
    return "diverged" if isinstance(exception, Diverged) else "failed"


def _by_member(module: LightningModule) -> dict[str, list[float | None]]:
    """Return measure -> one value per member; empty for an ordinary module."""
    if ensemble_size(module) == 1 or not isinstance(module, HasMembers):
        return {}
    return {name: [_finite(value) for value in values_S.tolist()] for name, values_S in module.members.items()}


def _finite(value: float | Tensor) -> float | None:
    number = float(f"{float(value):.6g}")  # fp32 holds no more digits
    return number if math.isfinite(number) else None
