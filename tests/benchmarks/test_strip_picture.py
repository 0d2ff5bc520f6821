"""The strip of several studies has every arm with values once, and the interval of the report."""

import json
import math
import sys

from benchmarks import strip_picture
from studies.engine.statistics import Estimate, Measured

MEASURE = "test/accuracy"


def report(study: str, **arms: dict) -> dict:
    return {
        "study": study,
        "arms": {
            arm: {
                "values": {MEASURE: values},
                "estimates": {MEASURE: {"value": 0.5, "low": low, "high": None, "seeds": len(values)}},
            }
            for arm, (values, low) in arms.items()
        },
    }


def test_arms_of_two_reports(tmp_path, monkeypatch):
    reports = [report("first", a=({"0": 0.25, "1": 0.75}, 0.0), b=({}, None)), report("second", a=({"0": 0.5}, None))]
    found = strip_picture.by_arm(reports, MEASURE)
    assert list(found) == ["a", "a, second"]
    series, mean = found["a"]
    assert series == {0: Measured(0.25), 1: Measured(0.75)}
    assert (mean.value, mean.low, mean.seeds) == (0.5, 0.0, 2)
    assert isinstance(found["a, second"][1], Estimate)
    assert math.isnan(found["a, second"][1].low)
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, content in zip(paths, reports, strict=True):
        path.write_text(json.dumps(content))
    picture = tmp_path / "strip.svg"
    monkeypatch.setattr(sys, "argv", ["strip_picture.py", str(picture), MEASURE, *map(str, paths)])
    strip_picture.main()
    assert picture.read_text().count("<svg")
