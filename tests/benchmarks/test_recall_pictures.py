"""The curve of recall takes the point of the best rate from the reports, and leaves out arms that have not run."""

import json
import sys

from benchmarks import recall_pictures

ESTIMATE = {"value": 0.5, "low": None, "high": None, "n": 1}


def test_points_lie_at_the_size_of_each_state(tmp_path, monkeypatch, capsys):
    arms = {
        "gated_delta_128": {"estimates": {recall_pictures.MEASURE: ESTIMATE | {"value": 0.75}}},
        "gated_delta_64": {"estimates": {recall_pictures.MEASURE: ESTIMATE}},
        "rate_1_128": {"estimates": {recall_pictures.MEASURE: ESTIMATE}},
        "two_blocks_64": {"estimates": {recall_pictures.MEASURE: ESTIMATE}},
        "window_64": {"estimates": {recall_pictures.MEASURE: ESTIMATE | {"value": 0.25}}},
        "window_128": {"estimates": {}},
        "attention_64": {"estimates": {recall_pictures.MEASURE: ESTIMATE | {"value": None}}},
    }
    others = [{"rate_1_64": {"estimates": {recall_pictures.MEASURE: ESTIMATE | {"value": x}}}} for x in (0.625, 0.25)]
    series = recall_pictures.points([arms, *others])
    assert {name: [point[:2] for point in own] for name, own in series.items()} == {
        "gated_delta": [(64, 4 * 64**2), (128, 4 * 128**2)],
        "two_blocks": [(64, 4 * 64**2)],
        "window": [(64, 4 * 4 * 16 * 64)],
    }
    reports = [tmp_path / f"{number}.json" for number in range(3)]
    for report, given in zip(reports, [arms, *others], strict=True):
        report.write_text(json.dumps({"arms": given}))
    picture = tmp_path / "curve.svg"
    monkeypatch.setattr(sys, "argv", ["recall_pictures.py", str(picture), *map(str, reports)])
    recall_pictures.main()
    printed = capsys.readouterr().out
    assert "| gated delta rule | 128 | 65536 | 0.750 |" in printed
    assert "| gated delta rule | 64 | 16384 | 0.625 |" in printed  # the best of three, of which two have one name
    assert picture.read_text().count("<svg")
