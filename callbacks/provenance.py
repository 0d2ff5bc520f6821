"""Where a result comes from: the git revision, the versions of packages, and the hardware."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

PACKAGES = ("lightning", "torch", "triton", "transformers", "datasets", "torchmetrics", "jsonargparse", "numpy")
CHECKOUT = Path(__file__).resolve().parent.parent


def git_state(folder: Path = CHECKOUT) -> dict[str, Any]:
    """Return the revision and the dirty flag of the checkout of this platform; None for both if there is no checkout.

    Args:
        folder: The root folder of the checkout.
    """

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # If the platform is installed in an environment inside another repository, git answers for that repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return {"revision": None, "dirty": None}
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"revision": None, "dirty": None}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on, without packages that are missing."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def hardware(trainer: Trainer) -> dict[str, Any]:
    """Return the name of the device, the number of devices per node, the number of processes, and the precision."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {processor()}"
    return {
        "device": name,
        "count": trainer.num_devices,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
    }


def processor() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def run_seed() -> int | None:
    """Return the seed of `seed_everything`, also if it chose the seed itself; None if it was not called."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return int(seed) if seed else None
