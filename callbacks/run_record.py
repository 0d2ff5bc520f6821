"""The record that every run leaves behind."""

import hashlib
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_modules.core.reporting import ensemble_size

PACKAGES = ("lightning", "torch", "triton", "transformers", "datasets", "torchmetrics", "jsonargparse", "numpy")
CHECKOUT = Path(__file__).resolve().parent.parent


class RunRecord(Callback):
    """Writes `results.json` into the run's folder: what was run, on what, for how long, with which outcome.

    The file is there from the start (`status: running`) and is replaced as a whole at the end of every stage, so that
    a killed run still tells what it reached. A module may offer `intervals: dict[str, tuple[float, float]]` and
    `counts: dict[str, int]`, by metric name; they are copied beside the metrics. Of an ensemble, `members` has each
    measure's value for every member, in order of their seeds, and `members.jsonl` the same at every validation. NaN and
    infinity become null.

    Args:
        command: The command line, without the program's name.
        configs: Paths of the config files.
        config: The resolved config as plain types, logged once as hyperparameters.

    Attributes:
        test_follows: Whether a fit is not the run's end.
    """

    def __init__(
        self, command: Sequence[str] = (), configs: Sequence[str] = (), config: dict[str, Any] | None = None
    ) -> None:
        self.configs = list(configs)
        self.config = config or {}
        self.record: dict[str, Any] = {"status": "running", "command": list(command), "configs": self.configs}
        self.record |= {"seconds": {}, "steps": 0, "metrics": {}, "intervals": {}, "n": {}}
        self.path: Path | None = None
        self.test_follows = False
        self._started = time.monotonic()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the record with all that is known before the stage begins."""
        self._open(trainer, trainer.log_dir)  # log_dir is a collective: asked for on all ranks
        self._started = time.monotonic()
        self.record["status"] = "running"
        if self.path and stage == "fit" and trainer.logger and self.config:
            trainer.logger.log_hyperparams(self.config)
        self._write()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adds the stage's time, metrics and intervals."""
        metrics = trainer.callback_metrics  # may synchronise metrics over the ranks
        self._update(trainer, stage, "running" if stage == "fit" and self.test_follows else "finished")
        self.record["metrics"] |= {name: _finite(value) for name, value in metrics.items() if value.numel() == 1}
        for name, (low, high) in getattr(pl_module, "intervals", {}).items():
            self.record["intervals"][name] = [_finite(low), _finite(high)]
        self.record["n"] |= {name: int(count) for name, count in getattr(pl_module, "counts", {}).items()}
        if ensemble_size(pl_module) > 1:
            self.record["members"] = self.record.get("members", {}) | _by_member(pl_module)
        self._write()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds a line on every member of an ensemble."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self.path and fitting and ensemble_size(pl_module) > 1:
            with open(self.path.with_name("members.jsonl"), "a") as file:
                file.write(json.dumps({"step": trainer.global_step} | _by_member(pl_module)) + "\n")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Says how the run ended; metrics of stages that came to their end are kept."""
        self._open(trainer, trainer.default_root_dir)  # a datamodule's setup fails before ours began
        interrupted = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        stage = trainer.state.fn.value if trainer.state.fn else "fit"
        self._update(trainer, stage, "interrupted" if interrupted else "failed")
        self._write()

    def _open(self, trainer: Trainer, folder: str) -> None:
        if self.path or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        self.path = Path(folder, "results.json")
        self.record |= {"seed": _seed(), "git": git_state(), "versions": versions(), "hardware": hardware(trainer)}

    def _update(self, trainer: Trainer, stage: str, status: str) -> None:
        self.record["status"] = status
        self.record["seconds"][stage] = round(time.monotonic() - self._started, 3)
        self.record["steps"] = trainer.global_step

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".json.tmp")
        draft.write_text(json.dumps(self.record, indent=2, allow_nan=False) + "\n")
        draft.replace(self.path)  # atomic: a reader sees the old record or the new one, never half of one

    def table(self) -> str:
        """The final metrics as a table: value, 95 % interval and n where the module tells them."""
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


def make_run_dir(config_file: str | None, resolved: str, parent: str = "runs") -> Path:
    """Makes `<parent>/<config name>/<YYYYmmdd-HHMMSS>-<hash>/`, with a counter if that exists already.

    Args:
        config_file: Gives the name; None means `adhoc`. A run's own `config.yaml` stands for the config that it ran.
        resolved: The resolved config, which is hashed.
        parent: Where runs are kept, relative to the current folder.
    """
    file = Path(config_file or "adhoc")
    rerun = file.name == "config.yaml" and (file.parent / "results.json").exists()
    digest = hashlib.sha256(resolved.encode()).hexdigest()[:6]
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{digest}"
    family = Path(parent, file.resolve().parent.parent.name if rerun else file.stem)
    folder, copies = family / name, 1
    while True:
        try:
            folder.mkdir(parents=True)  # atomic, so that parallel runs never share a folder
            return folder
        except FileExistsError:
            copies += 1
            folder = family / f"{name}-{copies}"


def git_state(folder: Path = CHECKOUT) -> dict[str, Any]:
    """Revision and dirty flag of the platform's own checkout; nulls where it is installed without one."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # Installed into an environment inside some other repository, git would answer for that one.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return {"revision": None, "dirty": None}
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"revision": None, "dirty": None}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(trainer: Trainer) -> dict[str, Any]:
    """The device's name, how many this run used, and the precision."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {_processor()}"
    return {
        "device": name,
        "count": trainer.num_devices,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _by_member(module: LightningModule) -> dict[str, list[float | None]]:
    return {name: [_finite(value) for value in values_S.tolist()] for name, values_S in module.members.items()}


def _seed() -> int | None:
    seed = os.environ.get("PL_GLOBAL_SEED")  # set by seed_everything, also when it chose the seed itself
    return int(seed) if seed else None


def _finite(value: Any) -> float | None:
    number = float(f"{float(value):.6g}")  # no more digits than fp32 holds
    return number if math.isfinite(number) else None
