"""The report of a study: estimates by arm, comparisons with the first arm, verdicts; as text, data and pictures."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from datamodules.errors import UserError
from lightning_modules.core.metrics import wilson_interval
from studies.engine import figures
from studies.engine.claims import Judgement, judge
from studies.engine.statistics import Measured, Series, difference, effect_size, mean, p_value
from studies.engine.study import Run, Study

Values = dict[str, dict[str, Series]]  # arm -> measure -> seed -> what was measured


def collect(study: Study) -> Values:
    """Read what finished runs measured; each member of an ensemble is a seed, the run's and those after it.

    Besides a run's metrics there are `seconds/fit`, `seconds/test`: what its stages took.
    """
    values: Values = {arm: {measure: {} for measure in study.measures} for arm in study.arms}
    for run in study.runs:
        record = run.result or {"metrics": {}, "seconds": {}}
        metrics = _metrics(record)
        for measure in study.measures:
            if members := record.get("members", {}).get(measure):
                n = record["n"].get(measure)
                own = {run.seed + member: _of_member(value, n) for member, value in enumerate(members)}
                values[run.arm][measure] |= own
            elif measure in metrics:
                interval = record["intervals"].get(measure) or [None]
                known = None if None in interval else tuple(interval)
                measured = Measured(_value(metrics[measure]), known, record["n"].get(measure))
                values[run.arm][measure][run.seed] = measured
    return values


def _metrics(record: dict[str, Any]) -> dict[str, float | None]:
    return record["metrics"] | {f"seconds/{stage}": taken for stage, taken in record["seconds"].items()}


def _of_member(value: float | None, count: int | None) -> Measured:
    if value is None or count is None:
        return Measured(_value(value), None, count)
    return Measured(value, wilson_interval(value * count, count), count)


def _value(value: float | None) -> float:
    return math.nan if value is None else value


def write(study: Study) -> str:
    """Write `report.md`, `report.json`, `runs.csv`, figures and TensorBoard events; return the report's text.

    Raises:
        UserError: Every arm has finished runs, and none has one of the measures.
    """
    values = collect(study)
    finished = [run for run in study.runs if run.result]
    every_arm = {run.arm for run in finished} == set(study.arms)  # else the arm that has it may still be to come
    for measure in study.measures:
        if every_arm and not any(values[arm][measure] for arm in study.arms):
            known = ", ".join(sorted(_metrics(finished[0].result)))
            raise UserError(f"measures: no finished run has '{measure}'; the first has {known}")
    verdicts = {claim.id: judge(claim, values) for claim in study.claims}
    data = summary(study, values, verdicts)
    drawn = figures.draw(study, values)
    study.folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(study.folder / "figures", ignore_errors=True)
    for name, figure in drawn.items():
        path = study.folder / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    text = render(study, data)
    pictures = [f"![{name}](figures/{name}.png)" for name in drawn]
    (study.folder / "report.json").write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
    (study.folder / "report.md").write_text("\n\n".join([text, *pictures]) + "\n")
    _write_runs(study)
    _write_events(study, drawn)
    return f"{text}\n\nreport: {study.folder / 'report.md'}"


def summary(study: Study, values: Values, verdicts: dict[str, Judgement]) -> dict[str, Any]:
    """The report as plain data; where nothing is known, null."""
    first, *others = study.arms
    arms = {}
    for arm in study.arms:
        arms[arm] = {
            "estimates": {measure: asdict(mean(series)) for measure, series in values[arm].items() if series},
            "values": {m: {str(s): x.value for s, x in sorted(series.items())} for m, series in values[arm].items()},
        }
    comparisons = []
    for measure in study.measures:
        for arm in others:
            ours, reference = values[arm][measure], values[first][measure]
            if ours and reference:
                row = {"measure": measure, "arm": arm, "against": first, **asdict(difference(ours, reference))}
                comparisons.append(row | {"effect_size": effect_size(ours, reference), "p": p_value(ours, reference)})
    claims = []
    for claim in study.claims:
        judged = verdicts[claim.id]
        row = {"id": claim.id, "claim": claim.text, "verdict": judged.verdict, "note": judged.note}
        claims.append(row | {key: getattr(judged.estimate, key) for key in ("value", "low", "high", "seeds")})
    runs = [run.result for run in study.runs if run.result]
    revisions = sorted({f"{r['git']['revision']}{' + changes' if r['git']['dirty'] else ''}" for r in runs})
    data = {"study": study.name, "runs": len(study.runs), "finished": len(runs), "revisions": revisions}
    return _plain(data | {"arms": arms, "comparisons": comparisons, "claims": claims})


def _plain(data: Any) -> Any:
    match data:
        case dict():
            return {key: _plain(value) for key, value in data.items()}
        case list():
            return [_plain(value) for value in data]
        case float():
            return data if math.isfinite(data) else None
    return data


def render(study: Study, data: dict[str, Any]) -> str:
    """The report as markdown."""
    missing = [run.name for run in study.runs if not run.result]
    parts = [f"# {study.name}", f"{data['finished']} of {data['runs']} runs finished."]
    if missing:
        parts.append(f"Missing: {'; '.join(missing)}.")
    if len(data["revisions"]) > 1:
        parts.append(f"Made by {len(data['revisions'])} revisions of the code: {', '.join(data['revisions'])}.")
    parts += ["## Arms", _by_arm(study, data, "estimates", _estimate)]
    if any(len(values) > 1 for arm in data["arms"].values() for values in arm["values"].values()):
        parts += ["## By seed", _by_arm(study, data, "values", lambda values: " ".join(map(_number, values.values())))]
    rows = [["measure", "arm", "difference", "95 % interval", "Hedges' g", "p"]]
    for row in data["comparisons"]:
        cells = [row["measure"], row["arm"], _number(row["value"]), _interval(row)]
        rows.append([*cells, _number(row["effect_size"]), _number(row["p"])])
    if len(rows) > 1:
        parts += [f"## Against {study.arms[0]}", table(rows)]
    rows = [["", "claim", "verdict", "value", "95 % interval", "note"]]
    for row in data["claims"]:
        rows.append([row["id"], row["claim"], row["verdict"], _number(row["value"]), _interval(row), row["note"]])
    if len(rows) > 1:
        parts += ["## Claims", table(rows)]
    return "\n\n".join(parts)


def _by_arm(study: Study, data: dict[str, Any], kind: str, tell: Callable[[Any], str]) -> str:
    rows = [["arm", *study.measures]]
    for arm in study.arms:
        found = data["arms"][arm][kind]
        rows.append([arm, *(tell(found[measure]) if found.get(measure) else "-" for measure in study.measures)])
    return table(rows)


def table(rows: list[list[str]]) -> str:
    """A markdown table whose columns line up in a terminal too."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"


def _estimate(estimate: dict[str, Any]) -> str:
    interval = _interval(estimate)
    return _number(estimate["value"]) + ("" if interval == "-" else f" {interval}")


def _interval(estimate: dict[str, Any]) -> str:
    if estimate["low"] is None or estimate["high"] is None:
        return "-"
    return f"[{_number(estimate['low'])}, {_number(estimate['high'])}]"


def _write_runs(study: Study) -> None:
    with open(study.folder / "runs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", "status", "seconds", "revision", "dirty", "folder", *study.measures])
        for run in study.runs:
            writer.writerow(_csv_row(study, run))


def _csv_row(study: Study, run: Run) -> list[Any]:
    record = run.result
    if record is None:
        return [run.arm, run.seed, "missing", "", "", "", run.folder, *("" for _ in study.measures)]
    known = _metrics(record)
    metrics = [known.get(measure) for measure in study.measures]
    seconds, git = round(sum(record["seconds"].values()), 1), record["git"]
    return [run.arm, run.seed, "finished", seconds, git["revision"], git["dirty"], run.folder, *metrics]


def _write_events(study: Study, drawn: dict[str, Any]) -> None:
    folder = study.folder / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for name, figure in drawn.items():
            writer.add_figure(name, figure)
        for run in study.runs:
            if record := run.result:
                known = _metrics(record)
                metrics = {m: known[m] for m in study.measures if known.get(m) is not None}
                factors = study.factors.get(run.arm, ("", {}))[1]
                hparams = {"arm": run.arm, "seed": run.seed} | {key: str(value) for key, value in factors.items()}
                writer.add_hparams(hparams, metrics, run_name=str(Path(run.arm, str(run.seed))))
