"""The device of a process, before there is a trainer: models are loaded onto it at once."""

import os
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.accelerators import CUDAAccelerator

CPU = torch.device("cpu")
# Parts of the names of strategies whose processes take their models from the CPU: the first ones split them over the
# devices, of which one may be too small for a whole model, and the last ones pass them to processes that are not there
FROM_CPU = ("fsdp", "deepspeed", "modelparallel", "model_parallel", "spawn", "fork", "notebook")


def device_of_run(flags: Namespace) -> torch.device:
    """Return the device that this process will train on, as far as it is one GPU; else the CPU.

    A wrong guess costs one copy, since the trainer moves the module to its device in any case.

    Args:
        flags: The user's flags of the trainer.
    """
    if flags.accelerator not in ("auto", "cuda", "gpu") or not CUDAAccelerator.is_available():
        return CPU
    if any(name in str(flags.strategy).lower() for name in FROM_CPU):
        return CPU
    devices: Any = -1 if flags.devices == "auto" else flags.devices
    try:
        gpus = CUDAAccelerator.parse_devices(devices) or []
    except Exception:  # of any class: the trainer says what is wrong with them
        return CPU
    rank = _local_rank()
    return torch.device("cuda", gpus[rank]) if rank < len(gpus) else CPU


def _local_rank() -> int:
    """Return the number of this process on its machine, by the variables of torchrun, Lightning or SLURM."""
    number = os.environ.get("LOCAL_RANK")
    if number is None and SLURMEnvironment.detect():
        number = os.environ.get("SLURM_LOCALID")
    return int(number or 0)
