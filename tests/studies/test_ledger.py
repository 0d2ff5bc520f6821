"""The ledger is complete, names only studies that weigh the claim, and shows the last verdict."""

import json
from collections import Counter

import pytest
import yaml
from conftest import ROOT

import main as cli
from datamodules.errors import UserError
from studies.engine import ledger

ENTRIES = ledger.read()
CLAIMS = {
    path.stem: set(yaml.safe_load(path.read_text())["claims"])
    for path in (ROOT / "studies").glob("*.yaml")
    if path.stem != "ledger"
}


def test_there_are_at_least_sixty_claims_over_five_documents():
    by_document = Counter(entry.id[:3] for entry in ENTRIES)
    assert set(by_document) == {"000", "001", "002", "003", "004"}
    assert len(ENTRIES) >= 60
    for document, count in by_document.items():
        numbers = [int(entry.id[4:]) for entry in ENTRIES if entry.id.startswith(document)]
        assert numbers == list(range(1, count + 1))


def test_an_entry_and_the_study_it_names_agree():
    weighed = {(name, claim[:6]) for name, claims in CLAIMS.items() for claim in claims if claim[:3].isdigit()}
    assert weighed == {(entry.study, entry.id) for entry in ENTRIES if entry.study != "-"}


def test_the_last_verdict_is_this_machines_or_else_the_kept_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ledger, "RESULTS", tmp_path / "kept")
    entry = next(entry for entry in ENTRIES if entry.study == "telepathy_controls")
    assert ledger.verdict(entry) == "not run"
    for folder, name, found in (
        (tmp_path / "kept", "telepathy_controls.json", "held"),
        (tmp_path / "runs/studies/telepathy_controls", "report.json", "refuted"),
    ):
        folder.mkdir(parents=True)
        claims = [{"id": entry.id, "verdict": found}, {"id": "other", "verdict": "undecided"}]
        (folder / name).write_text(json.dumps({"claims": claims, "finished": 1}))
        assert ledger.verdict(entry) == found
    nothing = tmp_path / "runs/studies/telepathy_collapse/report.json"
    nothing.parent.mkdir()
    nothing.write_text(json.dumps({"claims": [{"id": "004-09", "verdict": "undecided"}], "finished": 0}))
    assert ledger.verdict(next(entry for entry in ENTRIES if entry.id == "004-09")) == "not run"
    cli.main(["ledger", "--document", "004"])
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if entry.id in line)
    assert entry.claim in line
    assert "refuted" in line
    assert "not run" in shown.splitlines()[-1]
    assert "000-01" not in shown


@pytest.mark.parametrize(
    ("report", "found"),
    [
        ({"finished": 1, "claims": [("004-12", "held"), ("004-12b", "refuted"), ("004-1", "held")]}, "held, refuted"),
        ({"finished": 1, "claims": [("004-13", "held")]}, "not weighed"),
        ({"finished": 0, "diverged": [], "claims": [("004-12", "undecided")]}, "not run"),
        ({"finished": 0, "diverged": ["a"], "claims": [("004-12", "undecided")]}, "undecided"),
        ({"finished": 1, "claims": [("004-12", "maybe")]}, "damaged"),
    ],
)
def test_a_verdict_is_that_of_all_parts_of_a_claim(tmp_path, monkeypatch, report, found):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ledger, "RESULTS", tmp_path)
    report["claims"] = [{"id": name, "verdict": verdict} for name, verdict in report["claims"]]
    (tmp_path / "question.json").write_text(json.dumps(report))
    entry = ledger.LedgerEntry("004-12", "x", "y", "question")
    assert ledger.verdict(entry) == found
    monkeypatch.setattr(ledger, "read", lambda: [entry, ledger.LedgerEntry("005-01", "x", "y", "-")])
    lines = ledger.table("004").splitlines()
    assert lines[-1] == f"1 claims: 1 {found}"
    assert ("question.json is damaged" in lines[-3]) == (found == "damaged")


def test_a_claim_without_a_study_is_not_tested(monkeypatch):
    entries = [ledger.LedgerEntry("000-01", "x", "y", "-"), ledger.LedgerEntry("000-02", "x", "y", "-")]
    monkeypatch.setattr(ledger, "read", lambda: entries)
    assert ledger.table().splitlines()[-1] == "2 claims: 2 not tested"
    with pytest.raises(UserError, match="the ledger has no document 0-0"):
        ledger.table("0-0")


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([{"claim": "x"}], "entry 1 must have the fields"),
        ([{"id": "000-01", "claim": "x", "where": "y"}], "entry 000-01 must have the fields"),
        ([{"id": "000-01", "claim": "x", "where": "y", "study": "-", "note": "z"}], "000-01 must have the fields"),
        ([{"id": "000-01", "claim": "x", "where": "y", "study": "-"}] * 2, "two entries have the id 000-01"),
        ([{"id": "000-01", "claim": "x", "where": "y", "study": "gone"}], "names the study gone, which does not exist"),
    ],
)
def test_a_wrong_ledger_is_refused_in_words(tmp_path, entries, sentence):
    path = tmp_path / "ledger.yaml"
    path.write_text(yaml.safe_dump({"claims": entries}))
    with pytest.raises(UserError, match=sentence):
        ledger.read(path)


def test_a_document_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["ledger", "--document", "007"])
    assert ended.value.code == 2
    assert "--document: the ledger has no document 007; it has 000, 001, 002, 003, 004" in capsys.readouterr().err
