"""Grokking on a CPU: the small reference learns its training pairs by heart first, and the rule behind them later."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main as cli


def test_the_small_reference_memorises_first_and_generalises_later(workplace):
    """The config with two thirds of its steps, a minute on one core: early checks and late ones are of one run."""
    folder = workplace / "run"
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    options = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder), *quiet]
    options += ["--trainer.max_steps", "2000"]
    cli.main(["fit", "--config", "configs/separability_grokking_small.yaml", *options])
    events = EventAccumulator(str(folder)).Reload()
    train, held_out = (
        {point.step: point.value for point in events.Scalars(name)}
        for name in ("train/accuracy", "validation/accuracy")
    )
    memorised = min(step for step, accuracy in train.items() if accuracy == 1)
    assert memorised <= 200
    assert held_out[memorised] < 0.6
    generalised = min(step for step, accuracy in held_out.items() if accuracy >= 0.99)
    assert generalised >= 4 * memorised
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert metrics["train/accuracy"] == 1
    assert metrics["test/accuracy"] >= 0.99
    assert generalised <= metrics["stability/reached_step"] <= 1900
    assert metrics["stability/stable"] == 1
