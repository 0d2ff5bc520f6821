"""The report of a study: estimates by arm, comparisons with the first arm, verdicts; as text, data and figures."""

import csv
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from cli.choices import near
from datamodules.errors import UserError
from lightning_modules.core.files import replacing
from lightning_modules.core.intervals import wilson_interval
from studies.engine import events, figures
from studies.engine.judgement import Judgement, judge
from studies.engine.records import Record
from studies.engine.statistics import Measured, Values, difference, effect_size, mean, p_value
from studies.engine.study import Run, Study
from studies.engine.tables import markdown_table

DIVERGED = Measured(math.nan, diverged=True)


def collect(study: Study) -> Values:
    """Return what the runs measured that came to their end: arm -> measure -> seed -> value.

    A diverged run has no values. Each member of an ensemble is a seed, counted from the seed of its run. The measures
    `seconds/fit` and `seconds/test` are the durations of a run's stages.
    """
    values: dict[str, dict[str, dict[int, Measured]]]
    values = {arm: {measure: {} for measure in study.measures} for arm in study.arms}
    for run in study.runs:
        for measure in study.measures:
            if record := run.result:
                values[run.arm][measure] |= _measured(record, run.seed, measure)
            elif run.divergence:
                members = 1 if measure.startswith("seconds/") else run.members
                values[run.arm][measure] |= dict.fromkeys(range(run.seed, run.seed + members), DIVERGED)
    return values


def _measured(record: Record, seed: int, measure: str) -> dict[int, Measured]:
    """Return a measure by seed: one entry for each ensemble member, none if the run lacks the measure."""
    metrics, count, hits = all_metrics(record), record["n"].get(measure), record.get("hits", {}).get(measure, [])
    if members := record.get("members", {}).get(measure):
        counted: Sequence[int | None] = hits or [None] * len(members)
        return {
            seed + member: _member(value, count, hit)
            for member, (value, hit) in enumerate(zip(members, counted, strict=True))
        }
    if measure not in metrics:
        return {}
    value = metrics[measure]
    if value is None:
        return {seed: Measured(math.nan, count=count)}
    low, high = record["intervals"].get(measure, (None, None))
    interval = None if low is None or high is None else (low, high)
    return {seed: Measured(value, interval, count, hits[0] if hits and count else None)}


def _member(value: float | None, count: int | None, hits: int | None) -> Measured:
    if value is None:
        return Measured(math.nan, count=count)
    if not count or hits is None:
        return Measured(value, count=count)
    return Measured(value, wilson_interval(hits, count), count, hits)


def all_metrics(record: Record) -> dict[str, float | None]:
    """Return the metrics of a run, and `seconds/<stage>` for each of its stages."""
    return record["metrics"] | {f"seconds/{stage}": duration for stage, duration in record["seconds"].items()}


def write(study: Study) -> str:
    """Write `report.md`, `report.json`, `runs.csv`, figures and TensorBoard events; return the report's text.

    Raises:
        UserError: Every arm has finished runs, and none of them has one of the measures.
    """
    values = collect(study)
    _refuse_unknown_measures(study, values)
    verdicts = {claim.id: judge(claim, values) for claim in study.claims}
    data = summary(study, values, verdicts)
    drawn = figures.draw(study, values)
    pictures = study.folder / "figures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    for name, figure in drawn.items():
        figure.savefig(pictures / f"{name}.png")
    text = render(study, data)
    links = [f"![{name}](figures/{name}.png)" for name in drawn]
    with replacing(study.folder / "report.json") as draft:
        draft.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
    with replacing(study.folder / "report.md") as draft:
        draft.write_text("\n\n".join([text, *links]) + "\n")
    _write_runs(study)
    metrics = {(run.arm, run.seed): all_metrics(record) for run in study.runs if (record := run.result)}
    events.write(study, drawn, metrics)
    return f"{text}\n\nreport: {study.folder / 'report.md'}"


def _refuse_unknown_measures(study: Study, values: Values) -> None:
    finished = [(run.arm, record) for run in study.runs if (record := run.result)]
    if {arm for arm, _ in finished} != set(study.arms):
        return  # an arm that has the measure may have no finished run yet
    for measure in study.measures:
        if not any(not measured.diverged for arm in study.arms for measured in values[arm][measure].values()):
            known = sorted(all_metrics(finished[0][1]))
            nearest = near(measure, known) or f"; the first has {', '.join(known)}"
            raise UserError(f"measures: no finished run has '{measure}'{nearest}")


def summary(study: Study, values: Values, verdicts: dict[str, Judgement]) -> dict[str, Any]:
    """Return the report as plain data; null stands for a value that is unknown or infinite."""
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
    states = [record["git"] for run in study.runs if (record := run.result)]
    revisions = sorted({f"{state['revision']}{' + changes' if state['dirty'] else ''}" for state in states})
    ends = [(run, record) for run in study.runs if (record := run.divergence)]
    diverged = [{"arm": run.arm, "seed": run.seed, "step": record.get("step")} for run, record in ends]
    data = {"study": study.name, "runs": len(study.runs), "finished": len(states), "diverged": diverged}
    data |= {"revisions": revisions, "arms": arms, "comparisons": comparisons, "claims": claims}
    plain: dict[str, Any] = _plain(data)
    return plain


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
    """Return the report as Markdown."""
    missing = [
        f"{run.name} ({found.damage})" if found.damage else run.name
        for run in study.runs
        if not (found := run.outcome).record
    ]
    parts = [f"# {study.name}", f"{data['finished']} of {data['runs']} runs finished."]
    for row in data["diverged"]:
        parts.append(f"{row['arm']}, seed {row['seed']}, diverged at step {row['step']}.")
    if missing:
        parts.append(f"Missing: {'; '.join(missing)}.")
    if len(data["revisions"]) > 1:
        parts.append(f"The runs were made by {len(data['revisions'])} revisions: {', '.join(data['revisions'])}.")
    parts += ["## Arms", _by_arm(study, data, "estimates", _estimate)]
    if any(len(values) > 1 for arm in data["arms"].values() for values in arm["values"].values()):
        parts += ["## By seed", _by_arm(study, data, "values", lambda values: " ".join(map(_number, values.values())))]
    rows = [["measure", "arm", "difference", "95 % interval", "Hedges' g", "p"]]
    for row in data["comparisons"]:
        cells = [row["measure"], row["arm"], _number(row["value"]), _interval(row)]
        rows.append([*cells, _number(row["effect_size"]), _number(row["p"])])
    if len(rows) > 1:
        parts += [f"## Compared with {study.arms[0]}", markdown_table(rows)]
    rows = [["", "claim", "verdict", "value", "95 % interval", "note"]]
    for row in data["claims"]:
        rows.append([row["id"], row["claim"], row["verdict"], _number(row["value"]), _interval(row), row["note"]])
    if len(rows) > 1:
        parts += ["## Claims", markdown_table(rows)]
    return "\n\n".join(parts)


def _by_arm(study: Study, data: dict[str, Any], kind: str, show: Callable[[Any], str]) -> str:
    rows = [["arm", *study.measures]]
    for arm in study.arms:
        known = data["arms"][arm][kind]
        rows.append([arm, *(show(known[measure]) if known.get(measure) else "-" for measure in study.measures)])
    return markdown_table(rows)


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
    with replacing(study.folder / "runs.csv") as draft, open(draft, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", "status", "seconds", "revision", "dirty", "folder", *study.measures])
        for run in study.runs:
            writer.writerow(_csv_row(study, run))


def _csv_row(study: Study, run: Run) -> list[Any]:
    if (record := run.outcome.record) is None:
        return [run.arm, run.seed, "missing", "", "", "", run.folder, *("" for _ in study.measures)]
    known = all_metrics(record) if record["status"] == "finished" else {}
    metrics = [known.get(measure) for measure in study.measures]
    seconds, git = round(sum(record["seconds"].values()), 1), record["git"]
    return [run.arm, run.seed, record["status"], seconds, git["revision"], git["dirty"], run.folder, *metrics]
