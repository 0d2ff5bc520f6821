"""The ledger: what the seed documents claim, what tests it, and the last verdict."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

from datamodules.errors import UserError
from studies.engine.report import table as markdown_table

HERE = Path(__file__).resolve().parents[1]
LEDGER = HERE / "ledger.yaml"
RESULTS = HERE / "results"  # reports of studies that were run once and kept
RUNS = Path("runs", "studies")
FIELDS = {"id", "claim", "where", "study"}


@dataclass(frozen=True)
class Row:
    """A claim of a seed document.

    Attributes:
        id: `<document>-<number>`.
        claim: What is claimed.
        where: Where it stands in the document.
        study: The study that tests it, or `-`.
    """

    id: str
    claim: str
    where: str
    study: str


def read(path: str | Path = LEDGER) -> list[Row]:
    """Read the ledger.

    Raises:
        UserError: A row lacks a field or has another, an id comes twice, or a study does not exist.
    """
    rows = []
    for entry in yaml.safe_load(Path(path).read_text())["claims"]:
        if set(entry) != FIELDS:
            raise UserError(f"{path}: row {entry.get('id', len(rows) + 1)} must have {', '.join(sorted(FIELDS))}")
        rows.append(Row(**{key: str(value) for key, value in entry.items()}))
    if double := [name for name, count in Counter(row.id for row in rows).items() if count > 1]:
        raise UserError(f"{path}: {double[0]} comes twice")
    for row in rows:
        if row.study != "-" and not (Path(path).parent / f"{row.study}.yaml").exists():
            raise UserError(f"{path}: {row.id} names the study {row.study}, and there is none")
    return rows


def last_report(study: str) -> dict | None:
    """The report of this machine's runs of a study, if any is finished, else the one kept in the repository."""
    for path in (RUNS / study / "report.json", RESULTS / f"{study}.json"):
        report = json.loads(path.read_text()) if path.exists() else {}
        if report.get("finished"):
            return report
    return None


def verdict(row: Row) -> str:
    """`held`, `refuted` or `undecided`; `not run` if the study has no report, `-` if nothing tests the claim.

    A study may weigh a claim in several sentences, numbered `004-12`, `004-12b`; they are told one after the other.
    """
    if row.study == "-":
        return "-"
    report = last_report(row.study)
    if report is None:
        return "not run"
    found = [claim["verdict"] for claim in report["claims"] if claim["id"].rstrip("abcdefgh") == row.id]
    return ", ".join(found) or "not weighed"


def table(document: str = "") -> str:
    """The ledger with verdicts, and a count of them."""
    rows = [row for row in read() if row.id.startswith(document)]
    if not rows:
        raise UserError(f"the ledger has no rows of document {document}")
    verdicts = [verdict(row) for row in rows]
    cells = [[row.id, row.claim, row.study, found] for row, found in zip(rows, verdicts, strict=True)]
    counts = Counter("not tested" if found == "-" else found for found in verdicts)
    told = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return f"{markdown_table([['', 'claim', 'study', 'verdict'], *cells])}\n\n{len(rows)} claims: {told}"
