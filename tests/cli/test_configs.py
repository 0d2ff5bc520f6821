"""Every config in the repository runs: parsed, built, and one step of training, validation and test of each."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

import main as cli

RUNNABLE = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
PRESETS = sorted(path.stem for path in (ROOT / "configs" / "presets").glob("*.yaml"))
# What a config is meant for and a test machine does not have: time, GPUs, bf16 worth its name, cores for workers
SIZES = {"batch_size": 8, "epoch_size": 800, "validation_size": 8, "eval_batch_size": 8, "num_workers": 0}
TRAINER = {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
TRAINER |= {"enable_progress_bar": False, "enable_model_summary": False}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())


def tame_data(data: dict[str, Any]) -> dict[str, Any]:
    match data["class_path"]:
        case "ModularArithmetic":
            return {"num_workers": 0}  # in full batch the sizes follow from p, and are small
        case "InterleavedStreams" | "TextCorpus":
            return SIZES | {"test_size": 8}
        case "WordProblems":
            return SIZES | {"test_sets": dict.fromkeys(data.get("init_args", {}).get("test_sets", ["test"]), 8)}
    raise AssertionError(f"sizes for {data['class_path']} are missing here")


def tame_model(model: dict[str, Any]) -> dict[str, Any]:
    match model["class_path"]:
        case "LanguageModel":
            return {"tokenizer": {"texts": 300}, "save_to": "made"}
        case "Separability":
            return {"ensemble": min(model["init_args"].get("ensemble", 1), 2), "compile": False}
    return {}


@pytest.fixture
def launch(workplace) -> Callable[..., cli.CrosstalkCLI]:
    """Runs a command on a config with its overlays, all sizes small."""

    def call(command: str, name: str, *overlays: str, ckpt_path: Path | None = None, **trainer) -> cli.CrosstalkCLI:
        config = read(name)
        tame = {part: {"init_args": by(config[part])} for part, by in (("data", tame_data), ("model", tame_model))}
        Path("tame.yaml").write_text(yaml.safe_dump(tame | {"trainer": TRAINER | trainer}))
        files = [f"configs/{name}.yaml", *(f"configs/presets/{overlay}.yaml" for overlay in overlays), "tame.yaml"]
        checkpoint = ["--ckpt_path", str(ckpt_path)] if ckpt_path else []
        return cli.main([command, *(text for file in files for text in ("--config", file)), *checkpoint])

    return call


def test_there_are_configs():
    assert {"telepathy_v15", "telepathy_v16", "pair_source", "pair_target"} <= set(RUNNABLE)
    assert {f"separability_{task}" for task in ("interleaved", "grokking", "grokking_small", "text")} <= set(RUNNABLE)
    assert {"ddp", "debug", "profile", "reference", "clamp_naive", "noise", "freeze_routing"} <= set(PRESETS)


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_config_runs_as_it_is(launch, name):
    done = launch("fit", name, fast_dev_run=True)
    assert done.trainer.global_step == 1
    assert any(metric.startswith("test/") for metric in done.trainer.callback_metrics)
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_config_says_how_it_is_run_and_for_how_long(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    assert text.startswith(f"# python main.py fit --config configs/{name}.yaml")
    assert read(name)["trainer"]["max_steps"] > 0


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_over_the_config_that_its_first_line_names(launch, name):
    first_line = (ROOT / "configs" / "presets" / f"{name}.yaml").read_text().splitlines()[0]
    told, _, line = first_line.partition(" main.py ")
    command, *options = line.split()
    assert told == "# Overlay: python"
    assert options[0::2] == ["--config", "--config", "--ckpt_path"][: len(options) // 2]
    assert options[3] == f"configs/presets/{name}.yaml"
    config, preset = Path(options[1]).stem, read(f"presets/{name}")
    small = {"max_steps": 6, "limit_val_batches": 0, "strategy": "auto"}
    given = {}
    if "CHECKPOINT" in options:
        given["ckpt_path"] = launch("fit", config, **small).run_dir / "checkpoints" / "last.ckpt"
    if "reference.safetensors" in str(preset):
        shutil.copy(launch("fit", config, "reference", **small).run_dir / "reference.safetensors", ".")

    done = launch(command, config, name, **given, **small)
    assert done.trainer.global_step == (6 if command == "fit" else 0)
    tested = any(metric.startswith("test/") for metric in done.trainer.callback_metrics)
    assert tested == preset.get("test_after_fit", True)
    kept = [type(callback).__name__ for callback in done.trainer.callbacks]
    # An overlay adds callbacks and replaces none
    added = preset["trainer"].pop("callbacks+", [])
    assert {callback["class_path"] for callback in read(config)["trainer"]["callbacks"] + added} < set(kept)
    for key, value in preset["trainer"].items():
        set_to = done.config[command]["trainer"][key]
        if key not in {*small, "devices", "precision"}:
            assert set_to["class_path"].endswith(value["class_path"]) if isinstance(value, dict) else set_to == value
