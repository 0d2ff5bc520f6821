"""A study on a real SLURM of one node: time limits, a cancelled run, and a controller that goes away.

`python -m pytest -m slurm tests/slurm` as root, where Debian's `slurm-wlm` and `munge` are installed; takes minutes.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from one_node import OneNode, missing

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason=missing())]
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT / "tests" / "studies"))
from tiny_study import FOLDER, TINY, in_this_interpreter, write_study  # noqa: E402

import main as cli  # noqa: E402

STEPS = 30
MINUTE = 0.0167  # hours; SLURM counts minutes
SLOW = TINY | {"trainer.max_steps": STEPS, "trainer.val_check_interval": STEPS, "trainer.log_every_n_steps": 1}
SLOW |= {"trainer.callbacks": [{"class_path": "slow.Slow"}]}
PATIENCE = 600  # seconds; a busy machine imports the program slowly


@pytest.fixture(scope="module")
def slurm():
    with OneNode() as node:
        yield node


@pytest.fixture
def study(workplace, slurm, monkeypatch):
    """Gives a function that starts a study in a process of its own; ends it, and its jobs, after the test."""
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    for name, value in (slurm.environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}).items():
        monkeypatch.setenv(name, value)

    started = []

    def start(hours, seconds_per_step, **keys):
        line = [*write_study(set=SLOW, claims={}, curves=[], **keys), "--executor=slurm", "--gpus=0", "--cpus=1"]
        with open("output.txt", "w") as output:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "main.py"), *line, f"--hours={hours}"],
                env=os.environ | {"SECONDS_PER_STEP": str(seconds_per_step)},
                stdout=output,
                stderr=output,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
    slurm.cancel_jobs()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of the runs without an interruption, by seed."""
    with pytest.MonkeyPatch.context() as patch, in_this_interpreter():
        folder = tmp_path_factory.mktemp("whole")
        (folder / "configs").symlink_to(ROOT / "configs")
        patch.chdir(folder)
        cli.main(write_study(set=SLOW, claims={}, curves=[], seeds=2))
        return weights()


def weights():
    found = {}
    for path in FOLDER.glob("runs/control/*/checkpoints/last.ckpt"):
        assert json.loads((path.parents[1] / "results.json").read_text())["status"] == "finished"
        found[path.parents[1].name.partition("-")[0]] = torch.load(path, weights_only=True)["state_dict"]
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for seed, state in expected.items():
        assert all(torch.equal(value, found[seed][name]) for name, value in state.items()), f"seed {seed}"


def wait_until(happens, process):
    deadline = time.monotonic() + PATIENCE
    while not happens():
        assert process.poll() is None, Path("output.txt").read_text()
        assert time.monotonic() < deadline, Path("output.txt").read_text()
        time.sleep(0.2)


def output_of(process):
    code = process.wait(PATIENCE)
    shown = Path("output.txt").read_text()
    assert "Traceback" not in shown
    assert "sacct" not in shown
    return code, shown


def begun():
    """The number of runs of the control that have made a step."""
    return len(list(FOLDER.glob("runs/control/*/began")))


def test_a_run_that_needs_three_time_limits_ends_with_the_same_weights(study, whole):
    code, shown = output_of(study(MINUTE, seconds_per_step=3.5, seeds=1, arms={"control": {}}))
    assert (code, "finished: control, seed 0" in shown) == (0, True), shown
    job = next((FOLDER / "jobs").glob("*_0_log.out"))
    assert job.read_text().count("Loading pickle") >= 3, job.read_text()
    assert_same(weights(), {"0": whole["0"]})


def test_without_a_step_of_progress_a_run_is_not_queued_again(study):
    code, shown = output_of(study(MINUTE, seconds_per_step=300, seeds=1, arms={"control": {}}))
    assert code == 1
    assert "reached its time limit without a step of progress since it began: raise --hours" in shown
    assert next((FOLDER / "jobs").glob("*_0_log.out")).read_text().count("Loading pickle") == 1


def test_a_cancelled_run_leaves_the_others_and_continues_when_the_study_is_called_again(study, slurm, whole):
    process = study(1, seconds_per_step=1.5, seeds=2)
    wait_until(lambda: begun() == 2, process)
    jobs = slurm.call("squeue", "--noheader", "--array", "--format=%i").split()
    slurm.call("scancel", next(job for job in jobs if job.endswith("_0")))
    code, shown = output_of(process)
    assert code == 1
    assert "FAILED: control, seed 0 (interrupted)" in shown
    assert "finished: control, seed 1" in shown
    assert "2 of 4 runs failed: control, seed 0, silenced, seed 0" in shown
    code, shown = output_of(study(1, seconds_per_step=0, seeds=2))
    assert code == 0, shown
    assert_same(weights(), whole)


def test_a_controller_that_is_restarted_does_no_harm(study, slurm, whole):
    process = study(1, seconds_per_step=1, seeds=2)
    wait_until(lambda: begun() == 2, process)
    slurm.kill_controller()
    time.sleep(12)  # two looks at the queue
    slurm.start_controller()
    code, shown = output_of(process)
    assert code == 0, shown
    assert_same(weights(), whole)


def test_ctrl_c_cancels_the_jobs_and_the_runs_save(study, slurm):
    process = study(1, seconds_per_step=1, seeds=1)
    wait_until(lambda: begun() == 1, process)
    process.terminate()
    code, shown = output_of(process)
    assert (code, shown.endswith("interrupted: call it again to continue\n")) == (143, True), shown
    deadline = time.monotonic() + 60
    while slurm.call("squeue", "--noheader"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    (record,) = FOLDER.glob("runs/control/*/results.json")
    assert json.loads(record.read_text())["status"] == "interrupted"
    assert yaml.safe_load(record.read_text())["steps"] > 0
