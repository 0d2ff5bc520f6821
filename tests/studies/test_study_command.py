"""`study` from end to end, on runs of a second: report, failure, interruption, SLURM."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main as cli

TINY = {
    "trainer.max_steps": 4,
    "trainer.val_check_interval": 2,
    "trainer.callbacks": [],
    "trainer.accelerator": "cpu",
    "data.batch_size": 4,
    "data.validation_size": 8,
    "data.test_sets": {"test": 8},
    "model.max_new_tokens": 4,
    "model.warmup_steps": 1,
}
STUDY = {
    "base": ["configs/telepathy_v16.yaml"],
    "set": TINY,
    "arms": {
        "control": {},
        "silenced": {
            "command": "test",
            "set": {
                "ckpt_path": "{arms.control.checkpoint}",
                "trainer.callbacks": [
                    {"class_path": "ActivationClamp", "init_args": {"site": "soft_tokens", "mode": "zero"}}
                ],
            },
        },
    },
    "measures": ["test/ce_bridge", "test/accuracy"],
    "curves": ["validation/loss"],
    "claims": {
        "apart": "difference(control.ce_bridge, silenced.ce_bridge) < 100",
        "solved": "control.accuracy > 0.5",
    },
}


@pytest.fixture
def study(workplace):
    """Writes a study and gives a function that runs it as a user would."""

    def call(*args, check=None, path="", **keys):
        Path("question.yaml").write_text(yaml.safe_dump(STUDY | keys, sort_keys=False))
        environment = os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        line = [sys.executable, str(ROOT / "main.py"), "study", "question.yaml", *args]
        done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
        if check is not None:
            assert done.returncode == check, done.stdout + done.stderr
        return done

    return call


@pytest.fixture(scope="module")
def kept():
    """What a whole study left, kept from one test to the next."""
    return {}


def reports():
    folder = Path("runs/studies/question")
    return [(folder / name).read_text() for name in ("report.json", "report.md")]


def test_a_study_ends_in_a_report_and_is_not_run_twice(study, kept):
    study("--report-only", check=0)
    assert json.loads(reports()[0])["finished"] == 0
    folder = Path("runs/studies/question")
    assert not (folder / "runs").exists()
    done = study(check=0)
    data = json.loads((folder / "report.json").read_text())
    assert (data["runs"], data["finished"]) == (2, 2)
    assert [row["verdict"] for row in data["claims"]] == ["undecided", "refuted"]
    assert data["claims"][0]["note"] == "one seed, whose run gives no interval; at least 2 seeds would tell the spread"
    made = {
        arm: json.loads(next((folder / "runs" / arm).glob("*/results.json")).read_text())
        for arm in ("control", "silenced")
    }
    for arm, record in made.items():
        for measure in STUDY["measures"]:
            assert data["arms"][arm]["values"][measure] == {"0": record["metrics"][measure]}
            assert f"{record['metrics'][measure]:.3g}" in done.stdout
    accuracy = data["arms"]["control"]["estimates"]["test/accuracy"]
    assert [accuracy["low"], accuracy["high"]] == pytest.approx(made["control"]["intervals"]["test/accuracy"])
    assert made["silenced"]["metrics"]["test/ce_bridge"] != made["control"]["metrics"]["test/ce_bridge"]
    rows = (folder / "runs.csv").read_text().splitlines()
    assert rows[0].startswith("arm,seed,status,seconds,revision")
    assert [row.split(",")[:3] for row in rows[1:]] == [["control", "0", "finished"], ["silenced", "0", "finished"]]
    pictures = {path.name for path in (folder / "figures").iterdir()}
    assert pictures == {"strip_test_ce_bridge.png", "strip_test_accuracy.png", "curve_validation_loss.png"}
    assert list((folder / "tensorboard").rglob("events*"))

    first, began = reports(), time.monotonic()
    again = study(check=0)
    assert "2 of 2 runs are finished already" in again.stdout
    assert time.monotonic() - began < 60
    assert reports() == first
    kept["reports"] = first


def test_a_failing_arm_leaves_the_others_and_a_bad_exit_code(study):
    # The site is looked for when the run begins, so that the config by itself is right
    broken = {
        "trainer.callbacks": [{"class_path": "ActivationClamp", "init_args": {"site": "nowhere", "mode": "zero"}}]
    }
    dependent = {"command": "test", "set": {"ckpt_path": "{arms.broken.checkpoint}"}}
    arms = {"control": {}, "broken": {"set": broken}, "dependent": dependent}
    claims = {"one": "control.ce_bridge > 0", "two": "broken.ce_bridge > 0"}
    done = study("--jobs", "2", arms=arms, claims=claims, check=1)
    shown = done.stdout + done.stderr
    assert "FAILED: broken, seed 0" in shown
    assert "'nowhere'" in shown
    assert "left out: dependent, seed 0, for broken failed" in shown
    assert "2 of 3 runs failed: broken, seed 0, dependent, seed 0" in shown
    data = json.loads(reports()[0])
    assert data["finished"] == 1
    assert [row["note"] for row in data["claims"]][1] == "no finished run of broken"
    assert data["arms"]["control"]["values"]["test/ce_bridge"]


@pytest.mark.parametrize(
    ("signal_", "whole_group"),
    [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGINT, True)],
    ids=["the study killed", "killed with its runs", "Ctrl-C"],
)
def test_broken_off_and_called_again_it_ends_with_the_same_report(study, kept, signal_, whole_group):
    if "reports" not in kept:
        study(check=0)
        kept["reports"] = reports()
        shutil.move("runs", "whole")
    Path("question.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    line = [sys.executable, str(ROOT / "main.py"), "study", "question.yaml"]
    with open("broken_off.txt", "w") as output:
        process = subprocess.Popen(
            line,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
            # Tests that a shell runs in the background are deaf to Ctrl-C, and so would be what they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    deadline = time.monotonic() + 120
    while not list(Path("runs").rglob("last.ckpt")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    if whole_group:
        os.killpg(process.pid, signal_)  # what it was at is broken off; else its runs go on without it
    else:
        process.send_signal(signal_)
    code, shown = process.wait(timeout=60), Path("broken_off.txt").read_text()
    if signal_ == signal.SIGINT:
        assert code == 130
        assert shown.endswith("interrupted: call it again to go on\n")
    assert "Traceback" not in shown
    study(check=0)
    assert reports() == kept["reports"]
    folder = next(Path("runs/studies/question/runs/control").glob("0-????????"))
    events = EventAccumulator(str(folder)).Reload()
    assert sorted({event.step for event in events.Scalars("validation/loss")}) == [1, 3]
    folders = [path for path in Path("runs/studies/question/runs/control").iterdir() if path.is_dir()]
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


def test_on_slurm_each_wave_is_an_array(study, tmp_path):
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (stand_ins / name).write_text(text.replace("{python}", sys.executable).replace("{{", "{").replace("}}", "}"))
        (stand_ins / name).chmod(0o755)
    options = ["--executor=slurm", "--partition=gpu", "--gpus=0", "--cpus=2", "--hours=1.5", "--memory=4GB", "--jobs=1"]
    study(*options, "--setup=[export PREPARED=yes]", path=str(stand_ins), seeds=2, check=0)
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


def test_help_reads_well(workplace, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for word in ("FILE", "--jobs", "--executor", "--partition", "--report-only", "runs/studies"):
        assert word in shown


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["question.yaml", "--jobs", "-1"], "--jobs -1: it must be at least 0"),
        (["question.yaml", "--executor", "slrum"], "slrum"),
        (["question.yaml", "--partitoin", "gpu"], "did you mean 'partition'"),
        (["nothing.yaml"], "there is no study nothing.yaml"),
        ([], "file"),
    ],
)
def test_options_are_checked(workplace, capsys, line, told):
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", *line])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
