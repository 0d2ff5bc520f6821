"""A study whose runs take a second, and a way to run it without starting an interpreter for each run."""

import pickle
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml

import main as cli
from studies.engine import local

TINY = {
    "trainer.max_steps": 4,
    "trainer.val_check_interval": 2,
    "trainer.callbacks": [],
    "trainer.accelerator": "cpu",
    "data.vocab_size": 32,
    "data.seq_len": 16,
    "data.batch_size": 4,
    "data.validation_size": 8,
    "data.test_size": 8,
    "model.vocab_size": 32,
    "model.seq_len": 16,
    "model.width": 16,
    "model.warmup_steps": 1,
}
ZERO = {"class_path": "ActivationClamp", "init_args": {"site": "final_norm", "mode": "zero"}}
STUDY = {
    "base": ["configs/separability_interleaved.yaml"],
    "set": TINY,
    "arms": {
        "control": {},
        "silenced": {
            "command": "test",
            "set": {"ckpt_path": "{arms.control.checkpoint}", "trainer.callbacks": [ZERO]},
        },
    },
    "measures": ["test/loss", "test/accuracy"],
    "curves": ["validation/loss"],
    "claims": {
        "apart": "difference(control.loss, silenced.loss) < 100",
        "solved": "control.accuracy > 0.5",
    },
}
FOLDER = Path("runs/studies/question")


def write_study(**keys: object) -> list[str]:
    """Write the study with some keys replaced; return the command line that runs it."""
    Path("question.yaml").write_text(yaml.safe_dump(STUDY | keys, sort_keys=False))
    return ["study", "question.yaml"]


def reports() -> list[str]:
    """The report as data and as text, without the revision: a commit during the tests is no fault of the study."""
    texts = [(FOLDER / name).read_text() for name in ("report.json", "report.md")]
    return [re.sub(r"\b[0-9a-f]{40}( \+ changes)?", "REVISION", text) for text in texts]


class Ended:
    """A job that has ended."""

    def done(self):
        return True

    def stderr(self):
        return ""


class AtOnce:
    """Stands in for `LocalExecutor`: an attempt runs in this interpreter when it is submitted."""

    spares = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def kill(self):
        pass

    def prepare(self, slot, environment):
        pass

    def submit(self, attempt, slot):
        pickle.loads(pickle.dumps(attempt))(run_main)
        return Ended()


def run_main(line, log, environment):
    with open(log, "w") as output, redirect_stdout(output), redirect_stderr(output):
        try:
            cli.main(line)
        except SystemExit as ended:
            return ended.code
        except Exception:
            traceback.print_exc()
            return 1
    return 0


@contextmanager
def in_this_interpreter() -> Iterator[None]:
    """Have the runs of studies take place in this interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "LocalExecutor", AtOnce)
        patch.setattr(sys, "argv", ["main.py"])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the processes that the tests start, for the same sums
        try:
            yield
        finally:
            torch.set_num_threads(threads)
