"""The ledger: the claims of the seed documents, the study that tests each, and the last verdict."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from studies.engine.records import Damaged, read_object
from studies.engine.tables import markdown_table

HERE = Path(__file__).resolve().parents[1]
LEDGER = HERE / "ledger.yaml"
RESULTS = HERE / "results"  # reports of studies that are kept in the repository
RUNS = Path("runs", "studies")
FIELDS = {"id", "claim", "where", "study"}
VERDICTS = ("held", "refuted", "undecided")


@dataclass(frozen=True)
class LedgerEntry:
    """A claim of a seed document.

    Attributes:
        id: `<document>-<number>`, such as `004-12`.
        claim: The claim in one sentence.
        where: The heading or the experiment in the document that makes the claim.
        study: The study that tests the claim, or `-`.
    """

    id: str
    claim: str
    where: str
    study: str


def read(path: str | Path = LEDGER) -> list[LedgerEntry]:
    """Read the ledger.

    Raises:
        UserError: The fields of an entry are not those of `LedgerEntry`, two entries have one id, or a study does not
            exist.
    """
    entries: list[LedgerEntry] = []
    for fields in _claims(path):
        if not isinstance(fields, dict) or set(fields) != FIELDS:
            name = fields.get("id", len(entries) + 1) if isinstance(fields, dict) else len(entries) + 1
            _refuse(f"{path}: entry {name} must have the fields {', '.join(sorted(FIELDS))}")
        entries.append(LedgerEntry(**{key: str(value) for key, value in fields.items()}))
    if double := [name for name, count in Counter(entry.id for entry in entries).items() if count > 1]:
        _refuse(f"{path}: two entries have the id {double[0]}")
    for entry in entries:
        if entry.study != "-" and not (Path(path).parent / f"{entry.study}.yaml").exists():
            _refuse(f"{path}: {entry.id} names the study {entry.study}, which does not exist")
    return entries


def _claims(path: str | Path) -> list[Any]:
    """Return the list under the key `claims` in the ledger's file."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        _refuse(f"the ledger {path} cannot be read: {error.strerror}")
    except (UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        _refuse(f"the ledger {path} is damaged: it is not YAML: {' '.join(str(error).split())}")
    claims = content.get("claims") if isinstance(content, dict) else None
    if not isinstance(claims, list):
        _refuse(f"the ledger {path} is damaged: it has no list of claims")
    return claims


def last_report(study: str) -> dict[str, Any] | None:
    """Return the report of a study from this machine if any of its runs has ended, else the one in the repository.

    Raises:
        Damaged: The report is not whole, or not what a study writes.
    """
    for path in (RUNS / study / "report.json", RESULTS / f"{study}.json"):
        if (report := read_object(path)) is None:
            continue
        if not _is_report(report):
            raise Damaged(f"{path} is damaged: it is not what a study writes")
        if report["finished"] or report.get("diverged"):
            return report
    return None


def _is_report(report: dict[str, Any]) -> bool:
    claims = report.get("claims")
    return (
        isinstance(report.get("finished"), int)
        and isinstance(claims, list)
        and all(isinstance(claim, dict) and isinstance(claim.get("id"), str) for claim in claims)
        and all(claim.get("verdict") in VERDICTS for claim in claims)
    )


def verdict(entry: LedgerEntry) -> str:
    """Return the last verdict on a claim.

    Returns:
        `held`, `refuted` or `undecided`; `not run` if the study has no report, `damaged` if its report is not whole,
        `not weighed` if its report lacks the claim, `-` if no study tests it. A study may test a claim in several
        parts, numbered `004-12`, `004-12b`; their verdicts are separated by commas.
    """
    if entry.study == "-":
        return "-"
    try:
        report = last_report(entry.study)
    except Damaged:
        return "damaged"
    if report is None:
        return "not run"
    found = [claim["verdict"] for claim in report["claims"] if claim["id"].rstrip("abcdefgh") == entry.id]
    return ", ".join(found) or "not weighed"


def table(document: str = "") -> str:
    """Return the ledger with its verdicts as a table, the number of claims by verdict, and the damaged reports.

    Args:
        document: Show only the entries of this document, such as `004`.

    Raises:
        UserError: The ledger has no such document.
    """
    entries = [entry for entry in read() if entry.id.startswith(document)]
    if not entries:
        known = ", ".join(sorted({entry.id.partition("-")[0] for entry in read()}))
        _refuse(f"--document: the ledger has no document {document}; it has {known}")
    verdicts = [verdict(entry) for entry in entries]
    rows = [[entry.id, entry.claim, entry.study, found] for entry, found in zip(entries, verdicts, strict=True)]
    counts = Counter("not tested" if found == "-" else found for found in verdicts)
    summary = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    lines = [*_damage({entry.study for entry in entries}), f"{len(entries)} claims: {summary}"]
    return "\n\n".join([markdown_table([["", "claim", "study", "verdict"], *rows]), *lines])


def _damage(studies: set[str]) -> list[str]:
    """Return a sentence on each damaged report."""
    sentences = []
    for study in sorted(studies - {"-"}):
        try:
            last_report(study)
        except Damaged as error:
            sentences.append(str(error))
    return sentences


def _refuse(sentence: str) -> NoReturn:
    from datamodules.errors import UserError  # the package imports torch, without which the ledger starts at once

    raise UserError(sentence)
