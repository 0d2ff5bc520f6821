"""The ledger is complete, names only studies that weigh the claim, and shows the last verdict."""

import json
from collections import Counter

import pytest
import yaml
from conftest import ROOT

import main as cli
from studies.engine import ledger

ROWS = ledger.read()
CLAIMS = {
    path.stem: set(yaml.safe_load(path.read_text())["claims"])
    for path in (ROOT / "studies").glob("*.yaml")
    if path.stem != "ledger"
}


def test_there_are_at_least_sixty_claims_over_five_documents():
    by_document = Counter(row.id[:3] for row in ROWS)
    assert set(by_document) == {"000", "001", "002", "003", "004"}
    assert len(ROWS) >= 60
    for document, count in by_document.items():
        numbers = [int(row.id[4:]) for row in ROWS if row.id.startswith(document)]
        assert numbers == list(range(1, count + 1))


def test_a_row_and_the_study_it_names_agree():
    weighed = {(name, claim[:6]) for name, claims in CLAIMS.items() for claim in claims if claim[:3].isdigit()}
    assert weighed == {(row.study, row.id) for row in ROWS if row.study != "-"}


def test_the_last_verdict_is_this_machines_or_else_the_kept_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ledger, "RESULTS", tmp_path / "kept")
    row = next(row for row in ROWS if row.study == "telepathy_controls")
    assert ledger.verdict(row) == "not run"
    for folder, name, found in (
        (tmp_path / "kept", "telepathy_controls.json", "held"),
        (tmp_path / "runs/studies/telepathy_controls", "report.json", "refuted"),
    ):
        folder.mkdir(parents=True)
        claims = [{"id": row.id, "verdict": found}, {"id": "other", "verdict": "undecided"}]
        (folder / name).write_text(json.dumps({"claims": claims, "finished": 1}))
        assert ledger.verdict(row) == found
    nothing = tmp_path / "runs/studies/telepathy_collapse/report.json"
    nothing.parent.mkdir()
    nothing.write_text(json.dumps({"claims": [{"id": "004-09", "verdict": "undecided"}], "finished": 0}))
    assert ledger.verdict(next(row for row in ROWS if row.id == "004-09")) == "not run"
    cli.main(["ledger", "--document", "004"])
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if row.id in line)
    assert row.claim in line
    assert "refuted" in line
    assert "not tested" in shown.splitlines()[-1]
    assert "000-01" not in shown


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"id": "000-01", "claim": "x", "where": "y"}], "row 000-01 must have"),
        ([{"id": "000-01", "claim": "x", "where": "y", "study": "-"}] * 2, "000-01 comes twice"),
        ([{"id": "000-01", "claim": "x", "where": "y", "study": "gone"}], "names the study gone"),
    ],
)
def test_a_wrong_ledger_is_refused_in_words(tmp_path, rows, told):
    path = tmp_path / "ledger.yaml"
    path.write_text(yaml.safe_dump({"claims": rows}))
    with pytest.raises(ValueError, match=told):
        ledger.read(path)


def test_a_document_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["ledger", "--document", "007"])
    assert ended.value.code == 2
    assert "no rows of document 007" in capsys.readouterr().err
