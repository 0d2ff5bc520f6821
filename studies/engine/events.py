"""TensorBoard's view of a study: its figures, and a row for each run in the HPARAMS tab."""

import json
import shutil
from collections.abc import Mapping
from typing import Any, cast

from matplotlib.figure import Figure
from torch.utils.tensorboard import FileWriter, SummaryWriter
from torch.utils.tensorboard.summary import hparams

from studies.engine.study import Run, Study

MAX_CHOICES = 10  # values of a column that TensorBoard offers as a choice


def write(study: Study, figures: Mapping[str, Figure], metrics: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
    """Write the events of a study to the folder `tensorboard` in its folder.

    The experiment, which names all columns of the HPARAMS tab, lies at the top; each finished run has the folder
    `<arm>/<seed>`.

    Args:
        study: The study.
        figures: Name -> figure.
        metrics: (arm, seed) -> metric -> value, for each finished run; None stands for no value.
    """
    folder = study.folder / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    rows = {(run.arm, run.seed): columns(study, run) for run in study.runs}
    domains = _domains(list(rows.values()))
    rows = {run: {key: _of_type(value, domains[key]) for key, value in row.items()} for run, row in rows.items()}
    examples = {key: value for row in rows.values() for key, value in row.items()}
    choices = {key: values for key, values in domains.items() if len(values) <= MAX_CHOICES}
    experiment, _, _ = hparams(examples, dict.fromkeys(study.measures, 0.0), choices)  # type: ignore[no-untyped-call]
    with SummaryWriter(str(folder)) as writer:
        _add(writer, experiment)
        for name, figure in figures.items():
            writer.add_figure(name, figure)
    for (arm, seed), known in metrics.items():
        _, start, end = hparams(rows[arm, seed], {})  # type: ignore[no-untyped-call]
        with SummaryWriter(str(folder / arm / str(seed))) as writer:
            _add(writer, start)
            for measure in study.measures:
                if (value := known.get(measure)) is not None:
                    writer.add_scalar(measure, value)
            _add(writer, end)


def columns(study: Study, run: Run) -> dict[str, Any]:
    """Return what sets a run apart: arm, seed, the settings in which the arms differ, and the factors of sweeps."""
    settings = study.settings.get(run.arm, {})
    factors = study.factors[run.arm].values if run.arm in study.factors else {}
    # A factor is usually a setting, under the same key or, for a callback, with the class name before its last part
    present = {(key.rpartition(".")[2], repr(value)) for key, value in settings.items()}
    others = {key: value for key, value in factors.items() if (key.rpartition(".")[2], repr(value)) not in present}
    return {"arm": run.arm, "seed": run.seed} | others | settings


def _domains(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of each column in the order in which they come: all floats, or all text."""
    domains: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        domains[key] = list(dict.fromkeys(float(value) if numeric else _text(value) for value in values))
    return domains


def _of_type(value: Any, domain: list[Any]) -> float | str:
    return float(value) if isinstance(domain[0], float) else _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _add(writer: SummaryWriter, summary: Any) -> None:
    cast(FileWriter, writer.file_writer).add_summary(summary)
