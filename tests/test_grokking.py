"""Grokking on a CPU: the small reference learns its training pairs by heart first, and the rule behind them later."""

import json

from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main as cli


def test_the_small_reference_memorises_first_and_generalises_later(tmp_path):
    """The config as it is: about a minute of training on one core."""
    config = ROOT / "configs" / "separability_grokking_small.yaml"
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    folder = ["--trainer.default_root_dir", str(tmp_path)]
    cli.main(["fit", "--config", str(config), "--trainer.accelerator", "cpu", *quiet, *folder])
    events = EventAccumulator(str(tmp_path)).Reload()
    train, held_out = (
        {point.step: point.value for point in events.Scalars(name)}
        for name in ("train/accuracy", "validation/accuracy")
    )
    memorised = min(step for step, accuracy in train.items() if accuracy == 1)
    assert memorised <= 300
    assert held_out[memorised] < 0.6
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert metrics["test/accuracy"] >= 0.99
    reached = min(step for step, accuracy in held_out.items() if accuracy >= 0.99)
    assert metrics["stability/reached_step"] >= reached >= 3 * memorised
    assert metrics["train/accuracy"] == 1
