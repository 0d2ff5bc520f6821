"""The pictures of telepathy studies: what stands where, from a report of known numbers."""

import json
import sys

import pytest

from benchmarks import telepathy_pictures as pictures

KEYS = ("value", "low", "high")


def report(tmp_path, arms: dict[str, dict[str, float | None]]):
    data = {
        arm: {"estimates": {f"test/{name}": dict(zip(KEYS, (x, x, x), strict=True)) for name, x in measures.items()}}
        for arm, measures in arms.items()
    }
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"arms": data}))
    return path


def test_each_version_has_a_rung_with_and_without_flaws(tmp_path):
    values = {"v1": 0.9, "v1_flaws": 0.1, "v4_primer": 0.5, "v15": 0.8, "vq_flaws": 0.2, "lm": None}
    path = report(tmp_path, {arm: {"accuracy": value, "distinct": 1.0} for arm, value in values.items()})
    figure = pictures.ladder(pictures.read(path))
    accuracy, transfer, _ = figure.axes
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["V1", "V4", "V15", "VQ", "LM"]
    drawn = {
        (line.get_xdata()[0], round(line.get_ydata()[0], 2)): line.get_color()
        for line in accuracy.lines
        if line.get_marker() in "ox" and len(line.get_xdata())
    }
    assert drawn == {(0.9, -0.15): "C0", (0.1, 0.15): "C3", (0.5, 1.0): "C7", (0.8, 1.85): "C0", (0.2, 3.15): "C3"}
    assert not any(len(line.get_xdata()) for line in transfer.lines if line.get_marker() in "ox")  # not measured


def test_codes_stand_at_their_own_bits_and_in_the_order_of_their_number(tmp_path):
    both = {"entity_transfer": 0.5, "soft_ms": 2.0, "text_ms": 1.0, "text_bits": 1400.0}
    arms = {
        "token": both | {"accuracy": 0.8, "soft_bits": 9e4},
        "k_128": both | {"accuracy": 0.9, "soft_bits": 2e5},
        "k_16": both | {"accuracy": 0.7, "soft_bits": 3e4},
        "vq_64": both | {"accuracy": 0.6, "soft_bits": 768.0, "code_bits": 500.0},
    }
    axes = pictures.compression(pictures.read(report(tmp_path, arms))).axes
    lines = {line.get_label(): line for line in axes[0].lines}
    assert (list(lines["soft tokens"].get_xdata()), list(lines["soft tokens"].get_ydata())) == ([3e4, 2e5], [0.7, 0.9])
    assert (list(lines["VQ codes"].get_xdata()), list(lines["VQ codes"].get_ydata())) == ([500.0], [0.6])
    assert list(lines["V16"].get_xdata()) == [9e4]
    levels = [line.get_ydata()[0] for line in axes[0].lines if line.get_linestyle() == ":"]
    assert levels == [pytest.approx(0.95 * 0.8)]
    assert [line.get_xdata()[0] for line in axes[0].lines if line.get_linestyle() == "--"] == [1400.0]
    assert list(axes[2].lines[0].get_xdata()) == [2.0, 2.0]


def test_the_command_writes_the_same_file_again(tmp_path, monkeypatch):
    path = report(tmp_path, {"v1": {"accuracy": 0.5}})
    for name in ("one.svg", "two.svg"):
        monkeypatch.setattr(sys, "argv", ["telepathy_pictures.py", "ladder", str(tmp_path / name), str(path)])
        pictures.main()
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
