"""The device that a process loads its models onto."""

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.accelerators import CUDAAccelerator

from cli.device import device_of_run

CPU = torch.device("cpu")


def flags(accelerator="auto", strategy="auto", devices="auto") -> Namespace:
    return Namespace(accelerator=accelerator, strategy=strategy, devices=devices)


@pytest.fixture
def four_gpus(monkeypatch):
    """A machine with four GPUs, as far as the flags go."""

    def parse(devices):
        if devices == -1:
            return [0, 1, 2, 3]
        return devices if isinstance(devices, list) else list(range(int(devices)))

    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: True)
    monkeypatch.setattr(CUDAAccelerator, "parse_devices", parse)
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("devices", "index"), [("auto", 0), (-1, 0), (2, 0), ([3], 3), ([2, 1], 2)])
def test_the_first_process_takes_the_first_device(four_gpus, devices, index):
    assert device_of_run(flags(devices=devices)) == torch.device("cuda", index)
    assert device_of_run(flags("gpu", "ddp", devices)) == torch.device("cuda", index)


@pytest.mark.parametrize(
    "variables", [{"LOCAL_RANK": "1"}, {"SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "run"}]
)
def test_each_rank_takes_its_device(four_gpus, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert device_of_run(flags(strategy="ddp")) == torch.device("cuda", 1)
    assert device_of_run(flags(strategy="ddp", devices=[3, 2])) == torch.device("cuda", 2)
    assert device_of_run(flags(devices=1)) == CPU  # the trainer knows better


@pytest.mark.parametrize("strategy", ["fsdp", Namespace(class_path="lightning.FSDPStrategy"), "ddp_spawn", "ddp_fork"])
def test_models_that_are_split_or_passed_on_stay_on_the_cpu(four_gpus, strategy):
    assert device_of_run(flags(strategy=strategy)) == CPU


def test_flags_that_the_trainer_refuses_are_left_to_it(four_gpus):
    assert device_of_run(flags(devices="many")) == CPU


def test_a_run_on_the_cpu(four_gpus, monkeypatch):
    assert device_of_run(flags("cpu")) == CPU
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: False)
    assert device_of_run(flags()) == CPU
