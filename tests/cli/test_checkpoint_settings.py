"""A checkpoint under another config: every difference that matters for the command is named, once, and no other."""

import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from cli.app import CrosstalkCLI
from cli.checkpoint_settings import changes_of_training, made_with
from cli.resolver import Resolver
from lightning_modules.separability import Separability

GROUP = {"lr": 0.0, "initial_lr": 4e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.01, "params": [0]}

SETTINGS = ["--model.optimizer.lr", 4e-3, "--model.optimizer.betas", "[0.9, 0.98]", "--model.optimizer.weight_decay"]
SETTINGS += [0.01, "--trainer.max_steps", 1900]


def resolved(command: str, config: str, *options: object) -> dict:
    line = [command, "--config", str(ROOT / "configs" / f"{config}.yaml"), *SETTINGS, *options]
    return Resolver([str(word) for word in line]).resolved


@pytest.fixture(scope="module")
def contents() -> dict[str, dict]:
    """Return the content of a checkpoint for each config: config and optimizer, as a fit would write them."""
    states = [{"state": {}, "param_groups": [GROUP]}]
    names = "telepathy_v16", "separability_grokking"
    return {name: {"config": resolved("fit", name), "optimizer_states": states} for name in names}


V16, GROKKING = "telepathy_v16", "separability_grokking"
INDIFFERENT = ["--data.num_workers", 1, "--data.eval_batch_size", 4, "--trainer.default_root_dir", "other"]
INDIFFERENT += ["--trainer.devices", 2, "--trainer.logger", "false", "--model.on_nonfinite", "continue"]
TRAINING = ["--model.optimizer.lr", 0.5, "--trainer.max_steps", 6, "--model.warmup_steps", 3, "--data.batch_size", 4]
DIFFERENCES = {
    "nothing": ("test", V16, INDIFFERENT, ""),
    "layer": ("test", V16, ["--model.source_layer", 2], "with model.source_layer 1, and this run has 2"),
    "prompt": (
        "predict",
        V16,
        ["--model.prompt", "Q {question}"],
        "with model.prompt 'Question: {question}\\nAnswer:', and this run has 'Q {question}'",
    ),
    "normalizer": (
        "validate",
        V16,
        ["--model.normalizer", "layer_norm"],
        "with model.normalizer none, and this run has layer_norm",
    ),
    "model": (
        "test",
        V16,
        ["--model.source.path", "assets/pair/target"],
        "with model.source.path 'assets/pair/source', and this run has 'assets/pair/target'",
    ),
    "bridge": (
        "test",
        V16,
        ["--model.bridge", "PerceiverBridge"],
        "with model.bridge TokenBridge, and this run has PerceiverBridge",
    ),
    "sets": (
        "test",
        V16,
        ["--data.test_sets", "{other: 7}"],
        "with data.test_sets {'test': 1000}, and this run has {'other': 7}",
    ),
    "line": ("test", GROKKING, ["--model", "Telepathy"], "with model Separability, and this run has Telepathy"),
    "task": ("fit", GROKKING, ["--data.op", "mul"], "with data.op add, and this run has mul"),
    "two": (
        "test",
        V16,
        ["--data.seed", 3, "--model.output", "tanh"],
        "with model.output rms, and this run has tanh; with data.seed 0, and this run has 3",
    ),
    "training in a test": ("test", V16, TRAINING, ""),
    "a share of the training in a test": ("test", V16, ["--data.passkey_fraction", 0.5], ""),
    "seed in a test": ("test", V16, ["--seed_everything", 3], ""),
    "test sets in a validation": ("validate", V16, ["--data.test_sets", "{other: 7}"], ""),
    "nothing in a fit": ("fit", V16, INDIFFERENT, ""),
    "start in a fit": ("fit", GROKKING, ["--model.start", "x.ckpt"], ""),
    "seed in a fit": ("fit", V16, ["--seed_everything", 3], "with seed_everything 0, and this run has 3"),
    "batch in a fit": ("fit", V16, ["--data.batch_size", 4], "with data.batch_size 16, and this run has 4"),
    "clipping": (
        "fit",
        V16,
        ["--trainer.gradient_clip_val", 2],
        "with trainer.gradient_clip_val 1.0, and this run has 2",
    ),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_settings_that_matter_for_the_command_are_named(contents, monkeypatch, case):
    command, config, options, said = DIFFERENCES[case]
    monkeypatch.chdir(ROOT)
    here = resolved(command, config, *(options if case != "line" else []))
    if case == "line":
        here["model"] = resolved(command, V16)["model"]
    assert made_with(command, contents[config], here) == (said and f"made {said}")


def test_one_folder_under_two_names_is_no_difference(contents, monkeypatch):
    monkeypatch.chdir(ROOT)
    here = resolved("test", V16, "--model.source.path", ROOT / "assets" / "pair" / "source")
    assert made_with("test", contents[V16], here) == ""


CHANGES = {
    "nothing": (V16, [], []),
    "rate": (V16, ["--model.optimizer.lr", 0.5], ["ignores model.optimizer.lr 0.5 and keeps 0.004 of the"]),
    "betas": (
        V16,
        ["--model.optimizer.betas", "[0.5, 0.6]"],
        ["ignores model.optimizer.betas [0.5, 0.6] and keeps [0.9, 0.98]"],
    ),
    "decay and rate": (
        V16,
        ["--model.optimizer.weight_decay", 0, "--model.optimizer.lr", 1],
        ["model.optimizer.lr 1.0 and keeps 0.004", "model.optimizer.weight_decay 0.0 and keeps 0.01"],
    ),
    "steps": (V16, ["--trainer.max_steps", 6], ["trainer.max_steps changes from 1900 to 6, and with it the schedule"]),
    "warm-up": (V16, ["--model.warmup_steps", 3], ["model.warmup_steps changes from 200 to 3, and with it"]),
    "schedule": (GROKKING, ["--model.schedule", "cosine"], ["model.schedule changes from constant to cosine"]),
    "steps of a constant rate": (GROKKING, ["--trainer.max_steps", 6], []),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_resume_tells_what_it_ignores_and_what_changes_its_schedule(contents, case):
    config, options, said = CHANGES[case]
    content = contents[config]
    if config == GROKKING:  # AdamW's state of that config
        settings = content["config"]["model"]["init_args"]["optimizer"]["init_args"]
        content = content | {"optimizer_states": [{"state": {}, "param_groups": [settings]}]}
    sentences = changes_of_training(content, resolved("fit", config, *options))
    assert len(sentences) == len(said)
    assert all(part in sentence for part, sentence in zip(said, sentences, strict=True))


def test_a_checkpoint_without_a_config_is_used_in_silence_and_knows_its_optimizer(contents):
    content = {"optimizer_states": contents[V16]["optimizer_states"]}
    here = resolved("fit", V16, "--model.source_layer", 2, "--trainer.max_steps", 5, "--model.optimizer.lr", 0.5)
    assert made_with("fit", content, here) == ""
    assert changes_of_training(content, here) == [
        "the resume ignores model.optimizer.lr 0.5 and keeps 0.004 of the checkpoint"
    ]


class Built(CrosstalkCLI):
    """Builds everything and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def warned(*line: object) -> list[str]:
    """Build a command and return its warnings that name `--ckpt_path`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Built(list(map(str, line)))
    return [text for text in (str(warning.message) for warning in caught) if "--ckpt_path" in text]


UNTRAINED = {
    "test": (V16, ["test"], "test without --ckpt_path: the weights of Telepathy are untrained"),
    "validate": (V16, ["validate"], "validate without --ckpt_path: the weights of Telepathy are untrained"),
    "predict": (GROKKING, ["predict"], "predict without --ckpt_path: the weights of Separability are untrained"),
    "fit": (V16, ["fit"], ""),
    "dry run": (V16, ["test", "--trainer.fast_dev_run", "true"], ""),
    "another run's": (GROKKING, ["test", "--model.start", "a.ckpt"], ""),
    "from scratch": ("pair_source", ["test"], "the weights of QuestionAnswering are untrained"),
    "pretrained": (
        "pair_source",
        [
            "test",
            "--model.config",
            "null",
            "--model.tokenizer",
            "null",
            "--model.pretrained.path",
            "assets/pair/source",
        ],
        "",
    ),
}


@pytest.mark.parametrize("case", UNTRAINED)
def test_an_evaluation_without_a_checkpoint_says_that_the_weights_are_untrained(workplace, case):
    config, (command, *options), said = UNTRAINED[case]
    file = Path("configs", f"{config}.yaml")
    if case == "another run's":
        settings = resolved("test", config)["model"]["init_args"]
        sizes = {key: settings[key] for key in ("vocab_size", "seq_len", "width", "depth", "heads", "norm")}
        network = Separability(**sizes).network
        torch.save({"state_dict": {f"network.{name}": value for name, value in network.state_dict().items()}}, "a.ckpt")
    sentences = warned(command, "--config", file, *options)
    assert len(sentences) == bool(said)
    assert said in "".join(sentences)
