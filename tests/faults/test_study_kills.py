"""A study that is killed at random moments, alone or with its runs, ends with the undisturbed report."""

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from toy_processes import processes
from zygote import ROOT, SIZES

pytestmark = pytest.mark.faults
CODES = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15}, signal.SIGINT: {130, -2}}  # negative: during imports
CLAMP = "[{class_path: ActivationClamp, init_args: {site: final_norm, mode: zero}}]"
STUDY = {
    "base": ["configs/separability_interleaved.yaml"],
    "set": {key: yaml.safe_load(str(value)) for key, value in SIZES.items()} | {"trainer.log_every_n_steps": 50},
    "arms": {
        "control": {},
        "further": {"set": {"model.start": "{arms.control.checkpoint}"}},
        "silenced": {
            "command": "test",
            "set": {"ckpt_path": "{arms.further.checkpoint}", "trainer.callbacks": yaml.safe_load(CLAMP)},
        },
    },
    "measures": ["test/loss", "test/accuracy"],
    "claims": {"solved": "control.accuracy > 0.5", "apart": "difference(control, silenced) < 100"},
}


class Studied:
    """A study in a folder of its own, which is called again and again."""

    def __init__(self, folder: Path, zygote) -> None:
        self.folder, self.zygote, self.calls = folder, zygote, 0
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        (folder / "configs").symlink_to(ROOT / "configs")
        (folder / "question.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))

    def call(self, number: int | None = None, after: float = 0.0, everything: bool = False) -> int:
        """Call the study; send a signal after some seconds, to it or to all its processes; return the exit code."""
        output = self.folder / f"call-{self.calls}.txt"
        self.calls += 1
        (study,) = self.zygote.start(["study", "question.yaml"], self.folder, output, TMPDIR=str(self.temporary))
        if number is not None:
            time.sleep(after)
            for process in processes(study) if everything else [study]:
                with suppress(ProcessLookupError):
                    os.kill(process, number)
        (code,) = self.zygote.wait()
        if everything or number != signal.SIGKILL:
            assert wait_for_none(study), "processes are left"
        shown = output.read_text()
        assert "Traceback" not in shown, shown
        assert code in ({0} if number is None else CODES[number] | {0}), shown
        for path in self.folder.joinpath("runs").rglob("*"):
            assert not path.name.endswith(".tmp"), path
            if path.name == "log.txt":
                assert "Traceback" not in path.read_text(), path.read_text()
            elif path.suffix == ".ckpt":
                torch.load(path, weights_only=True)
            elif path.suffix == ".json":
                json.loads(path.read_text())
        return code

    def result(self) -> tuple[dict, dict]:
        """Return the report without revisions, and the weights of the runs that train."""
        report = json.loads((self.folder / "runs/studies/question/report.json").read_text())
        report.pop("revisions")
        runs = self.folder / "runs/studies/question/runs"
        files = {arm: next((runs / arm).glob("0-????????/checkpoints/last.ckpt")) for arm in ("control", "further")}
        return report, {arm: torch.load(path, weights_only=True)["state_dict"] for arm, path in files.items()}


def wait_for_none(session: int) -> bool:
    deadline = time.monotonic() + 15
    while (left := processes(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, zygote):
    """Return the duration, the report and the weights of the study without kills."""
    studied, began = Studied(tmp_path_factory.mktemp("undisturbed") / "study", zygote), time.monotonic()
    studied.call()
    return time.monotonic() - began, *studied.result()


@pytest.mark.parametrize("seed", range(4))
def test_a_study_survives_kills(zygote, tmp_path, undisturbed, seed):
    seconds, report, weights = undisturbed
    rng, killed, anew = random.Random(seed), [], 0
    while not any(killed):
        studied = Studied(tmp_path / f"study-{anew}", zygote)
        numbers = rng.choices(list(CODES), k=4)
        killed = [studied.call(number, rng.uniform(1, seconds), rng.random() < 0.5) for number in numbers]
        anew, seconds = anew + 1, seconds / 2  # if all came too late, the undisturbed study was slow for another reason
    studied.call()
    found_report, found_weights = studied.result()
    assert found_report == report
    for arm, state in weights.items():
        assert all(torch.equal(value, found_weights[arm][name]) for name, value in state.items()), arm
