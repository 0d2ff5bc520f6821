"""A resumed run is the uninterrupted run; a checkpoint holds the bridge and nothing else."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cli.app import CrosstalkCLI

STEPS, MIDDLE = 8, 4
EMA = "--trainer.callbacks+=EMAWeightAveraging"
SAVE = [
    "--trainer.callbacks+=ModelCheckpoint",
    *(f"--trainer.callbacks.{key}" for key in (f"every_n_train_steps={MIDDLE}", "save_top_k=-1")),
]
PERCEIVER = ["--model.bridge", "PerceiverBridge", "--model.bridge.soft_tokens", "8"]
BUDGET = ["--data.max_tokens", "1100", "--data.batch_size", "40"]
WIDTH = ["--model.bridge.hidden", "32"]


@pytest.fixture
def train(run):
    """Return a function that trains V16 in a folder; an epoch ends between the checkpoint and the last step."""

    def call(folder: str, *args: object) -> CrosstalkCLI:
        options = ["--data.epoch_size", 40, "--trainer.max_steps", STEPS, "--trainer.log_every_n_steps", 1]
        options += [
            "--trainer.val_check_interval",
            3,
            "--trainer.default_root_dir",
            folder,
            "--model.bridge.hidden",
            64,
        ]
        return run("fit", "telepathy_v16", *options, "--test_after_fit", "false", *args)

    return call


def series(folder: str) -> dict[str, dict[int, float]]:
    """Return every scalar that a run logged, by step."""
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    timed = ("throughput", "epoch")
    names = [name for name in events.Tags()["scalars"] if not name.startswith(timed)]
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in names}


@pytest.mark.parametrize(
    "options",
    [[], [EMA, "--trainer.callbacks.decay=0.5"], ["--model.normalizer", "statistical"], BUDGET],
    ids=["plain", "ema", "statistical normalizer", "token budget"],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(train, options):
    whole = train("whole", *SAVE, *options)
    (middle,) = Path("whole/checkpoints").glob(f"*step={MIDDLE}.ckpt")
    resumed = train("resumed", *options, "--ckpt_path", middle)
    assert resumed.trainer.global_step == STEPS
    expected, found = series("whole"), series("resumed")
    assert {"train/loss", "train/lm", "lr-AdamW", "validation/loss"} <= set(expected)
    assert len(expected["train/loss"]) == STEPS
    for name in ("train/loss", "train/lm", "lr-AdamW", "validation/loss"):
        later = {step: value for step, value in expected[name].items() if step >= MIDDLE}
        assert later, name
        assert found[name] == later, name
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("options", [[], [EMA], ["--model.normalizer", "statistical"]], ids=["plain", "ema", "norm"])
def test_a_checkpoint_holds_the_bridge_and_no_more(train, options):
    done = train("mine", "--trainer.max_steps", 2, *options)
    file = Path("mine/checkpoints/last.ckpt")
    held = torch.load(file, weights_only=True)
    trained = {name for name, value in done.model.named_parameters() if value.requires_grad}
    trained |= {"normalizer.mean_C", "normalizer.std_C"} if "statistical" in options else set()
    assert set(held["state_dict"]) == trained
    assert {name.partition(".")[0] for name in trained} <= {"bridge", "soft_tokens", "normalizer"}
    copies = 3 if not options or EMA not in options else 4  # weights, two moments, and the average
    if EMA in options:
        assert set(held["current_model_state"]) == trained
        assert not any("source" in key or "target" in key for key in held["averaging_state"])
    size = sum(4 * done.model.state_dict()[name].numel() for name in trained)
    assert size * copies < file.stat().st_size < size * copies + 100_000


def test_a_checkpoint_is_tested_as_it_was_at_the_end_of_the_fit(train, run):
    done = train("mine", "--trainer.max_steps", 3, "--test_after_fit", "true")
    config = ["--model.bridge.hidden", 64, "--ckpt_path", "mine/checkpoints/last.ckpt"]
    again = run("test", "telepathy_v16", *config, "--trainer.default_root_dir", "again")
    measured = {name: value for name, value in done.record.record["metrics"].items() if name.startswith("test/")}
    for name, value in measured.items():
        assert again.record.record["metrics"][name] == value or name.endswith("_ms"), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (WIDTH, "does not fit the config: bridge.map"),
        (PERCEIVER, "made with model.bridge TokenBridge, and this run has PerceiverBridge"),
        (
            ["--model.normalizer", "statistical"],
            "it lacks the model's parameter normalizer.mean_C; it was made with model.normalizer none",
        ),
    ],
    ids=["width", "kind", "normalizer"],
)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_of_another_bridge_is_refused_in_words(train, run, capsys, command, options, said):
    train("mine", "--trainer.max_steps", 1)
    capsys.readouterr()
    config = ["--ckpt_path", "mine/checkpoints/last.ckpt", "--model.bridge.hidden", 64]
    with pytest.raises(SystemExit) as ended:
        run(command, "telepathy_v16", *(options if options is PERCEIVER else [*config, *options]), *config[:2])
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in errors[errors.index("error: ") :]
    assert "Traceback" not in errors
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.*"))
