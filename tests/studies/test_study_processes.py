"""`study` in processes of its own: what survives a kill or Ctrl-C, and what SLURM is asked."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from light_attempt import LightAttempt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_study import FOLDER, TINY, in_this_interpreter, reports, write_study
from toy_processes import processes

import main as cli
from studies.engine import execution

# Long enough that a kill after the first checkpoint comes before the end of the run
LONGER = TINY | {"data.batch_size": 64, "data.seq_len": 128, "model.seq_len": 128, "model.width": 64}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The reports of the study without an interruption."""
    with pytest.MonkeyPatch.context() as patch, in_this_interpreter():
        folder = tmp_path_factory.mktemp("whole")
        (folder / "configs").symlink_to(ROOT / "configs")
        patch.chdir(folder)
        cli.main(write_study(set=LONGER))
        return reports()


def start(line):
    """Start a study as a user does, in a process group of its own."""
    with open("output.txt", "w") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "main.py"), *line],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
            # Tests that a shell runs in the background ignore Ctrl-C, and so would the processes that they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def interrupt(process, signal_, everything):
    """Send a signal once there is a checkpoint; check how the study ends."""
    deadline = time.monotonic() + 120
    while not list(Path("runs").rglob("last.ckpt")):
        assert time.monotonic() < deadline, Path("output.txt").read_text()
        assert process.poll() is None, Path("output.txt").read_text()
        time.sleep(0.02)
    for target in processes(process.pid) if everything else [process.pid]:
        os.kill(target, signal_)
    code = process.wait(60)
    shown = Path("output.txt").read_text()
    if signal_ != signal.SIGKILL:
        assert code == 128 + signal_
        assert shown.endswith("interrupted: call it again to continue\n")
        assert processes(process.pid) == []
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("signal_", "everything"),
    [
        pytest.param(signal.SIGKILL, False, id="the study killed", marks=pytest.mark.faults),
        pytest.param(signal.SIGKILL, True, id="killed with its runs", marks=pytest.mark.faults),
        pytest.param(signal.SIGINT, False, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, True, id="SIGTERM to all", marks=pytest.mark.faults),
    ],
)
def test_interrupted_and_called_again_it_ends_with_the_same_report(workplace, whole, signal_, everything):
    line = write_study(set=LONGER)
    interrupt(start(line), signal_, everything)
    if signal_ != signal.SIGKILL:
        (record,) = FOLDER.rglob("results.json")
        assert json.loads(record.read_text())["status"] == "interrupted"
    with in_this_interpreter():
        cli.main(line)
    assert reports() == whole
    folder = next((FOLDER / "runs/control").glob("0-????????"))
    events = EventAccumulator(str(folder)).Reload()
    assert sorted({event.step for event in events.Scalars("validation/loss")}) == [1, 3]
    folders = [path for path in (FOLDER / "runs/control").iterdir() if path.is_dir()]
    assert len(folders) == 1


SBATCH = """#!{python}
import json, os, re, subprocess, sys
script = open(sys.argv[-1]).read()
options = dict(re.findall(r"#SBATCH --([a-z-]+)=(\\S+)", script))
calls = os.path.join(os.path.dirname(__file__), "calls.jsonl")
number = sum(1 for _ in open(calls)) + 1 if os.path.exists(calls) else 1
with open(calls, "a") as file:
    print(json.dumps(dict(options=options, script=script)), file=file)
job = str(100 * number)
first, _, last = options["array"].partition("%")[0].partition("-")
for task in range(int(first), int(last or first) + 1):
    environment = dict(os.environ, SLURM_JOB_ID=job, SLURM_ARRAY_JOB_ID=job, SLURM_ARRAY_TASK_ID=str(task))
    environment.update(SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0", SLURM_PROCID="0", SLURM_LOCALID="0",
                       SLURM_JOB_NODELIST="localhost", SLURM_JOB_NAME=options["job-name"], SLURM_NTASKS_PER_NODE="1")
    subprocess.Popen(["bash", sys.argv[-1]], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job", job)
"""
SRUN = """#!{python}
import os, re, subprocess, sys
line = sys.argv[1:]
while line[0].startswith("--"):
    option = line.pop(0)
    if option in ("--output", "--error"):
        path = line.pop(0).replace("%A", os.environ["SLURM_ARRAY_JOB_ID"]).replace("%t", "0")
        path = path.replace("%a", os.environ["SLURM_ARRAY_TASK_ID"])
        os.environ["TO_" + option.strip("-").upper()] = path
with open(os.environ["TO_OUTPUT"], "w") as out, open(os.environ["TO_ERROR"], "w") as err:
    sys.exit(subprocess.run(line, stdout=out, stderr=err).returncode)
"""
SACCT = """#!{python}
import json, os
calls = os.path.join(os.path.dirname(__file__), "calls.jsonl")
print("JobID|State|NodeList")
for number, line in enumerate(open(calls), 1):
    first, _, last = json.loads(line)["options"]["array"].partition("%")[0].partition("-")
    for task in range(int(first), int(last or first) + 1):
        print(f"{{100 * number}}_{{task}}|RUNNING|localhost")
"""


def test_on_slurm_each_wave_is_an_array(workplace, tmp_path, monkeypatch):
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (stand_ins / name).write_text(text.replace("{python}", sys.executable).replace("{{", "{").replace("}}", "}"))
        (stand_ins / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_ins}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    known = filter(None, [os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *known]))
    monkeypatch.setattr(execution, "Attempt", LightAttempt)
    options = ["--executor=slurm", "--partition=gpu", "--gpus=0", "--cpus=2", "--hours=1.5", "--memory=4GB", "--jobs=1"]
    cli.main([*write_study(seeds=2), *options, "--setup=[export PREPARED=yes]"])
    calls = [json.loads(line) for line in (stand_ins / "calls.jsonl").read_text().splitlines()]
    assert len(calls) == 2
    for wave, call in enumerate(calls):
        given = call["options"]
        assert given["job-name"] == f"question-wave{wave}"
        assert given["array"] == "0-1%1"
        assert (given["partition"], given["cpus-per-task"], given["time"], given["mem"]) == ("gpu", "2", "90", "4GB")
        assert "export PREPARED=yes" in call["script"]
        assert "gpus" not in call["script"]
    data = json.loads(reports()[0])
    assert (data["runs"], data["finished"]) == (4, 4)
    assert len(data["arms"]["silenced"]["values"]["test/accuracy"]) == 2
    real = next((FOLDER / "runs/control").glob("0-*/results.json"))
    assert json.loads(real.read_text())["steps"] == TINY["trainer.max_steps"]
