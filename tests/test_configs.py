"""Every config in the repository runs: parsed, built, and one step of training, validation and test of each."""

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import main as cli

RUNNABLE = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
PRESETS = sorted(path.stem for path in (ROOT / "configs" / "presets").glob("*.yaml"))
# What a config is meant for and a test machine does not have: GPUs, bf16 worth its name, cores for workers
TAME = {
    "data": {"batch_size": 8, "epoch_size": 800, "validation_size": 8, "eval_batch_size": 8, "num_workers": 0},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "precision": "32-true",
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


@pytest.fixture
def fit(workplace):
    """Runs a config with its overlays, all sizes small."""

    def call(name: str, *overlays: str, **trainer) -> cli.CrosstalkCLI:
        config = yaml.safe_load(Path(f"configs/{name}.yaml").read_text())
        sets = config["data"].get("init_args", {}).get("test_sets", {"test": 1})
        tame = {"data": {"init_args": TAME["data"] | {"test_sets": dict.fromkeys(sets, 8)}}}
        if config["model"]["class_path"] == "LanguageModel":
            tame["model"] = {"init_args": {"tokenizer": {"texts": 300}, "save_to": "made"}}
        tame["trainer"] = TAME["trainer"] | trainer
        Path("tame.yaml").write_text(yaml.safe_dump(tame))
        files = [f"configs/{name}.yaml", *(f"configs/presets/{overlay}.yaml" for overlay in overlays), "tame.yaml"]
        return cli.main(["fit", *(text for file in files for text in ("--config", file))])

    return call


def test_there_are_configs():
    assert {"telepathy_v15", "telepathy_v16", "pair_source", "pair_target"} <= set(RUNNABLE)
    assert {"ddp", "debug", "profile"} <= set(PRESETS)


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_config_runs_as_it_is(fit, name):
    done = fit(name, fast_dev_run=True)
    assert done.trainer.global_step == 1
    assert any(metric.startswith("test/") for metric in done.trainer.callback_metrics)
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_config_says_how_it_is_run_and_for_how_long(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    assert text.startswith(f"# python main.py fit --config configs/{name}.yaml")
    assert yaml.safe_load(text)["trainer"]["max_steps"] > 0


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_over_a_config(fit, name):
    text = (ROOT / "configs" / "presets" / f"{name}.yaml").read_text()
    assert f"--config configs/presets/{name}.yaml" in text.splitlines()[0]
    done = fit("telepathy_v15", name, max_steps=6, limit_val_batches=0, strategy="auto")
    assert done.trainer.global_step == 6
    kept = {type(callback).__name__ for callback in done.trainer.callbacks}
    assert {"QuickEval", "DiversityMonitor", "RunRecord"} <= kept  # an overlay adds callbacks and replaces none
    for key, value in yaml.safe_load(text)["trainer"].items():
        given = done.config["fit"]["trainer"][key]
        if key not in {"max_steps", "limit_val_batches", "strategy", "devices", "precision"}:
            assert given["class_path"].endswith(value["class_path"]) if isinstance(value, dict) else given == value, key
