"""Runs that are killed at random moments, again and again, end as the run that nobody disturbs."""

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from zygote import ROOT, SIZES, STEPS, Zygote

CODES = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15}, signal.SIGINT: {130, -2}}  # negative: during imports
FIRST = 1.0  # seconds before a run trains, at least


@pytest.fixture
def campaign(tmp_path, zygote):
    return Campaign(tmp_path, zygote)


class Campaign:
    """Attempts at one run, each in a folder of its own, each from the newest checkpoint of those before it."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.folder, self.zygote = folder, zygote
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        (folder / "configs").symlink_to(ROOT / "configs")
        self.attempts: list[Path] = []

    def attempt(self, number: int | None = None, after: float = 0.0) -> int:
        """Run, from the newest checkpoint; send a signal after some seconds; return the exit code."""
        folder = self.folder / f"attempt-{len(self.attempts)}"
        line = ["fit", "--config", "configs/separability_interleaved.yaml", f"--trainer.default_root_dir={folder}"]
        line += [f"--{key}={value}" for key, value in SIZES.items()]
        begin = self.newest()
        line += [f"--ckpt_path={begin}"] if begin else []
        output = self.folder / f"{folder.name}.txt"
        (run,) = self.zygote.start(line, self.folder, output, TMPDIR=str(self.temporary))
        if number is not None:
            time.sleep(after)
            with suppress(ProcessLookupError):  # it has ended
                os.kill(run, number)
        (code,) = self.zygote.wait()
        self.attempts.append(folder)
        self.check(folder, code, output.read_text(), step_of(begin) if begin else 0)
        if number is None or code == 0:
            assert code == 0, output.read_text()
        else:
            assert code in CODES[number], output.read_text()
        return code

    def newest(self) -> Path | None:
        found = [last for attempt in self.attempts for last in attempt.glob("checkpoints/last.ckpt")]
        return found[-1] if found else None

    def check(self, folder: Path, code: int, output: str, begin: int) -> None:
        """Every file is whole, none is left over, and the record says what happened."""
        assert "Traceback" not in output, output
        temporary = [path for path in self.temporary.rglob("*") if path.is_file()]
        assert not [path for path in temporary if "ompi." not in str(path)]  # MPI has a folder of its own there
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert not [path for path in files if path.name.startswith(".") or path.suffix == ".tmp"]
        for path in files:
            if path.suffix == ".ckpt":
                assert begin <= step_of(path) <= STEPS
            elif path.name == "results.json":
                status = json.loads(path.read_text())["status"]
                assert status in {0: {"finished"}, -9: {"running"}}.get(code, {"interrupted"})
        if (folder / "steps.txt").exists():
            steps = [int(line) for line in (folder / "steps.txt").read_text().split()]
            assert steps == list(range(begin + 1, begin + 1 + len(steps)))  # nothing that was saved is trained again
            if code in (130, 143):
                assert (
                    step_of(folder / "checkpoints" / "last.ckpt") == steps[-1]
                )  # and nothing that was trained is lost

    def result(self) -> tuple[dict, dict]:
        """Return the weights and the metrics at the end."""
        record = json.loads((self.attempts[-1] / "results.json").read_text())
        timed = ("throughput", "test/seconds", "epoch")
        metrics = {name: value for name, value in record["metrics"].items() if not name.startswith(timed)}
        state = torch.load(self.attempts[-1] / "checkpoints" / "last.ckpt", weights_only=True)
        return state["state_dict"], metrics | {"n": record["n"], "hits": record["hits"]}


def step_of(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, zygote):
    """Return the duration, the weights and the metrics of a run without kills."""
    campaign, began = Campaign(tmp_path_factory.mktemp("undisturbed"), zygote), time.monotonic()
    campaign.attempt()
    return time.monotonic() - began, *campaign.result()


def survive(campaign: Campaign, undisturbed, signals: list[int], seed: int) -> int:
    """Kill a run at random moments, let it end, and compare; return the number of runs that were killed."""
    seconds, weights, metrics = undisturbed
    rng, killed = random.Random(seed), 0
    for number in signals:
        killed += campaign.attempt(number, rng.uniform(0.3 * FIRST, seconds)) != 0
    campaign.attempt()
    found_weights, found_metrics = campaign.result()
    assert found_weights.keys() == weights.keys()
    assert all(torch.equal(value, found_weights[name]) for name, value in weights.items())
    assert found_metrics == metrics
    curves = {step for folder in campaign.attempts for step in validations(folder)}
    assert curves == {45, 90, 135, 180}
    return killed


def validations(folder: Path) -> set[int]:
    events = EventAccumulator(str(folder)).Reload() if list(folder.glob("events*")) else None
    known = events and "validation/loss" in events.Tags()["scalars"]
    return {event.step + 1 for event in events.Scalars("validation/loss")} if known else set()


@pytest.mark.parametrize("signals", [[9, 9], [15, 2]], ids=["SIGKILL", "SIGTERM, SIGINT"])
def test_a_run_survives_kills(campaign, undisturbed, signals):
    survive(campaign, undisturbed, signals, seed=3)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(10))
def test_a_run_survives_any_mixture_of_kills(campaign, undisturbed, seed):
    rng = random.Random(seed)
    assert survive(campaign, undisturbed, rng.choices(list(CODES), k=6), seed)
