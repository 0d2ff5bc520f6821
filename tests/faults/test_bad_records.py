"""Damaged records: a run is not taken for finished, the file is named in one sentence, and there is no stack trace."""

import json
import re
from pathlib import Path

import pytest
import yaml

import main as cli
from studies.engine import figures, ledger, report
from studies.engine.claims import parse
from studies.engine.study import Run, Study

ROOT = Path(__file__).parents[2]
RECORD = {
    "status": "finished",
    "seconds": {"fit": 2.0, "test": 1.0},
    "metrics": {"test/accuracy": 0.5},
    "intervals": {"test/accuracy": [0.4, 0.6]},
    "n": {"test/accuracy": 100},
    "hits": {"test/accuracy": [50]},
    "git": {"revision": None, "dirty": None},
}
WHOLE = json.dumps(RECORD)


def changed(**keys):
    return json.dumps({key: value for key, value in (RECORD | keys).items() if value is not ...})


BAD_RESULTS = {
    "empty": "",
    "blank": "\n",
    "cut in half": WHOLE[: len(WHOLE) // 2],
    "two objects": WHOLE + WHOLE,
    "zeros of a lost block": "\0" * 512,
    "not UTF-8": b"\xff\xfe" + WHOLE.encode("latin-1"),
    "a lone surrogate byte": WHOLE.replace("finished", "\udcff").encode("utf-8", "surrogateescape"),
    "a list": f"[{WHOLE}]",
    "a number": "7",
    "null": "null",
    "a text": '"finished"',
    "absurd nesting": "[" * 100_000,
    "NaN": WHOLE.replace("0.5", "NaN"),
    "an infinite number": WHOLE.replace("0.5", "1e999"),
    "a number that is too large": WHOLE.replace("0.5", "1" + "0" * 400),
    "no status": changed(status=...),
    "a status that is no text": changed(status=["finished"]),
    "no metrics": changed(metrics=...),
    "metrics that are a list": changed(metrics=[0.5]),
    "a metric that is a text": changed(metrics={"test/accuracy": "0.5"}),
    "a metric that is a truth value": changed(metrics={"test/accuracy": True}),
    "no seconds": changed(seconds=...),
    "seconds that are null": changed(seconds={"fit": None}),
    "no intervals": changed(intervals=...),
    "an interval with one end": changed(intervals={"test/accuracy": [0.4]}),
    "no n": changed(n=...),
    "a negative n": changed(n={"test/accuracy": 100, "test/other": -1}),
    "n that is a truth value": changed(n={"test/accuracy": True, "test/other": True}, hits={}),
    "n that is a fraction": changed(n={"test/accuracy": 1.5}),
    "more hits than samples": changed(hits={"test/accuracy": [101]}),
    "hits that are no list": changed(hits={"test/accuracy": 50}),
    "members that are no lists": changed(members={"test/accuracy": 0.5}),
    "members without hits for each": changed(members={"test/accuracy": [0.5, 0.5]}),
    "no git": changed(git=...),
    "git without a revision": changed(git={"dirty": None}),
    "git without a state": changed(git={"revision": None}),
    "git that is a list": changed(git=["revision", "dirty"]),
    "a revision that is a number": changed(git={"revision": 7, "dirty": None}),
    "a state that is a text": changed(git={"revision": None, "dirty": "no"}),
    "an end of an interval that is a text": changed(intervals={"test/accuracy": [0.4, "0.6"]}),
    "an interval that is a text": changed(intervals={"test/accuracy": "06"}),
    "an interval that is a mapping": changed(intervals={"test/accuracy": {"0": 1, "1": 2}}),
    "hits of which one is a text": changed(hits={"test/accuracy": [50, "50"]}),
    "a diverged run whose step is a text": changed(status="diverged", step="seven"),
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of two arms, whose runs are finished."""
    monkeypatch.chdir(tmp_path)
    runs = [Run(arm, 0, "fit", "", tmp_path / "runs" / arm / "0", 0) for arm in ("good", "bad")]
    for run in runs:
        write(run.folder / "results.json", WHOLE)
    claims = [parse("one", "difference(good, bad) < 1", ["good", "bad"], ["test/accuracy"])]
    return Study("question", tmp_path, ["good", "bad"], ["test/accuracy"], ["train/loss"], claims, runs)


@pytest.mark.parametrize("content", BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_a_damaged_result_is_no_result(study, content, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *_: {})  # slow, and the same for every case
    monkeypatch.setattr(report.events, "write", lambda *_: None)
    bad = study.runs[1]
    assert bad.result
    path = bad.folder / "results.json"
    write(path, content)
    assert (bad.result, bad.outcome.record) == (None, None)
    assert re.fullmatch(rf"{re.escape(str(path))} is damaged: it[^\n]+", bad.outcome.damage)
    text = report.write(study)
    assert f"Missing: bad, seed 0 ({bad.outcome.damage})." in text
    assert "no finished run of bad" in text
    assert "1 of 2 runs finished." in text


def test_a_run_that_still_runs_and_a_measure_without_a_value_are_no_damage(study):
    run = study.runs[1]
    write(run.folder / "results.json", '{"status": "running"}')
    assert (run.outcome.record, run.outcome.state, run.outcome.damage) == (None, "running", "")
    keys = {"status": "diverged", "step": None, "metrics": {"a": None}, "intervals": {"a": [None, 0.5]}}
    write(run.folder / "results.json", changed(**keys, members={"a": [None, 1]}, hits={"a": []}, n={"a": 0}))
    assert run.outcome.record["metrics"] == {"a": None}


def test_a_result_that_is_a_folder_is_no_result(study):
    path = study.runs[1].folder / "results.json"
    path.unlink()
    path.mkdir()
    assert study.runs[1].outcome.damage == f"{path} cannot be read: Is a directory"


def test_a_file_in_the_place_of_a_runs_folder_is_a_run_without_a_record(study):
    folder = study.runs[1].folder
    (folder / "results.json").unlink()
    folder.rmdir()
    folder.touch()
    assert (study.runs[1].outcome.record, study.runs[1].outcome.damage) == (None, "")


BAD_REPORTS = {
    "empty": "",
    "cut in half": '{"finished": 1, "claims": [{"id": "00',
    "a list": "[]",
    "no claims": '{"finished": 1}',
    "no number of runs": '{"claims": []}',
    "claims that are a mapping": '{"finished": 1, "claims": {}}',
    "a claim without an id": '{"finished": 1, "claims": [{"verdict": "held"}]}',
    "a claim without a verdict": '{"finished": 1, "claims": [{"id": "004-09"}]}',
    "a verdict that does not exist": '{"finished": 1, "claims": [{"id": "004-09", "verdict": "proven"}]}',
    "a verdict that is a list": '{"finished": 1, "claims": [{"id": "004-09", "verdict": ["held"]}]}',
    "a claim that is a text": '{"finished": 1, "claims": ["004-09"]}',
    "not UTF-8": b"\xff\xfe{}",
}


@pytest.mark.parametrize("kept", [False, True], ids=["of this machine", "kept"])
@pytest.mark.parametrize("content", BAD_REPORTS.values(), ids=BAD_REPORTS)
def test_the_ledger_shows_a_damaged_report(tmp_path, monkeypatch, capsys, content, kept):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ledger, "RESULTS", tmp_path / "kept")
    path = tmp_path / "kept/telepathy_collapse.json" if kept else Path("runs/studies/telepathy_collapse/report.json")
    write(path, content)
    cli.main(["ledger", "--document", "004"])
    shown = capsys.readouterr().out
    (row,) = (line for line in shown.splitlines() if line.startswith("| 004-09"))
    assert row.split("|")[-2].strip() == "damaged"
    (sentence,) = (line for line in shown.splitlines() if line.startswith(str(path)))
    assert "is damaged: it" in sentence
    assert "damaged" in shown.splitlines()[-1]  # counted


BAD_LEDGERS = {
    "missing": (None, "cannot be read: No such file"),
    "empty": ("", "it has no list of claims"),
    "a list": ("[]", "it has no list of claims"),
    "no claims": ("{entries: []}", "it has no list of claims"),
    "claims that are a mapping": ("{claims: {}}", "it has no list of claims"),
    "an entry that is a text": ("{claims: [one]}", "entry 1 must have the fields"),
    "an entry that is null": ("{claims: [null]}", "entry 1 must have the fields"),
    "no YAML": ("{claims: [", "it is not YAML"),
    "a tag that names code": ("claims: !!python/object:os.system {}", "it is not YAML"),
    "zeros of a lost block": ("\0" * 64, "it is not YAML"),
    "not UTF-8": (b"claims: \xff", "it is not YAML"),
    "absurd nesting": ("[" * 20_000, "it is not YAML"),
    "a bad date": ("claims: 2024-99-99", "it is not YAML"),
}


@pytest.mark.parametrize(("content", "sentence"), BAD_LEDGERS.values(), ids=BAD_LEDGERS)
def test_a_damaged_ledger_is_one_sentence(tmp_path, monkeypatch, capsys, content, sentence):
    path = tmp_path / "ledger.yaml"
    monkeypatch.setattr(ledger.read, "__defaults__", (path,))
    if content is not None:
        write(path, content)
    assert_one_sentence(["ledger"], capsys, sentence, str(path))


BAD_STUDIES = {
    "empty": "",
    "null": "null",
    "a list": "[1, 2]",
    "a text": "question",
    "no YAML": "base: [",
    "cut in half": (ROOT / "studies/exp_1.yaml").read_text()[:400] + "\n  'half",
    "not UTF-8": b"base: \xff",
    "zeros of a lost block": "\0" * 64,
    "a tag that names code": "base: !!python/object:os.system {}",
    "absurd nesting": "[" * 20_000,
    "arms that are a list": yaml.safe_dump({"base": [], "arms": ["a"], "measures": ["x"]}),
    "measures that are null": yaml.safe_dump({"base": [], "arms": {"a": {}}, "measures": None}),
    "an arm that is a text": yaml.safe_dump({"base": [], "arms": {"a": "fit"}, "measures": ["x"]}),
    "claims that are a list": yaml.safe_dump({"base": [], "arms": {"a": {}}, "measures": ["x"], "claims": ["a > 0"]}),
    "seeds that are a text": yaml.safe_dump({"base": [], "arms": {"a": {}}, "measures": ["x"], "seeds": "many"}),
}


@pytest.mark.parametrize("content", BAD_STUDIES.values(), ids=BAD_STUDIES)
def test_a_damaged_study_file_is_one_sentence(tmp_path, monkeypatch, capsys, content):
    monkeypatch.chdir(tmp_path)
    write(Path("question.yaml"), content)
    assert_one_sentence(["study", "question.yaml", "--report-only"], capsys, "")
    assert not Path("runs").exists()


def assert_one_sentence(line, capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert len(error) < 1000
    for word in words:
        assert word in error


def test_half_a_line_of_an_ensemble_is_left_out_of_its_curve(study):
    run = study.runs[0]
    lines = ['{"step": 2, "train/loss": [1.0, 3.0]}', "[]", '{"step": "x"}', '{"step": 4, "train/loss": [2.0', ""]
    (run.folder / "members.jsonl").write_text("\n".join(lines))
    assert figures._logged(run)("train/loss") == {2: [1.0, 3.0]}


@pytest.mark.parametrize("kind", ["folder", "zeros", "empty"])
def test_damaged_events_cost_the_curve_and_no_more(study, capsys, kind):
    path = study.runs[0].folder / "events.out.tfevents.1.host"
    path.mkdir() if kind == "folder" else write(path, b"\0" * 200 if kind == "zeros" else b"")
    assert figures._logged(study.runs[0])("train/loss") == {}
    error = capsys.readouterr().err
    assert (f"no curves of {path.parent}" in error) == (kind == "folder")
