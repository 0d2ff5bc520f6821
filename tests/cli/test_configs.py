"""Every config and preset of the repository runs: parsed, built, trained for a few steps, validated and tested."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import ROOT
from transformers import AutoTokenizer, BertConfig, BertModel

import main as cli
from cli.app import CrosstalkCLI
from lightning_modules.telepathy.flaws import Flaw
from lightning_modules.telepathy.objectives.parts import FLAW_OF
from studies.engine.resolver import resolve

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
PRESETS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs" / "presets").rglob("*.yaml"))
LADDER = [preset for preset in PRESETS if re.fullmatch(r"v\d+", Path(preset).stem)]
# Replaced because a test machine lacks it: time, GPUs, fast bf16, cores for loader workers
SIZES = {"batch_size": 8, "epoch_size": 800, "validation_size": 8, "eval_batch_size": 8, "num_workers": 0}
TRAINER = {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
TRAINER |= {"enable_progress_bar": False, "enable_model_summary": False}
LONG = 256  # tokens of a row at most
SIX_STEPS = {"max_steps": 6, "limit_val_batches": 0, "strategy": "auto"}


def read(path: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / path).read_text())


def first_line(path: str) -> str:
    return (ROOT / path).read_text().splitlines()[0]


def commands_of(preset: str) -> list[list[str]]:
    """The arguments of every command on a preset's first line; the last command is the one that uses the preset."""
    mark, _, line = first_line(preset).partition("# Overlay: ")
    commands = [shlex.split(command) for command in line.split(" && ")]
    assert mark == ""
    assert all(command[:2] == ["python", "main.py"] for command in commands)
    return [command[2:] for command in commands]


def small_data(data: dict[str, Any]) -> dict[str, Any]:
    match data["class_path"]:
        case "ModularArithmetic":
            return {"num_workers": 0}  # the sizes of a full batch follow from p and are small
        case "NeedleGym" if data["init_args"].get("seq_len", 0) > LONG:
            return SIZES | {
                "seq_len": LONG,
                "batch_size": 2,
                "eval_batch_size": 2,
                "test_size": 2,
                "validation_size": 2,
            }
        case "InterleavedStreams" | "NeedleGym":
            return SIZES | {"test_size": 8}
        case "StateTracking":
            return SIZES | {"test_size": 8, "test_len": LONG}
        case "TextCorpus":
            return SIZES | {"test_size": 8, "seq_len": 32}
        case "AssociativeRecall":
            sets = {"train_sets": [[64, 4, 16], [256, 64, 8]], "test_sets": [[64, 8], [128, 32]]}
            return sets | {"batch_size": 8, "validation_size": 8, "test_size": 8, "num_workers": 0}
        case "MemoryItems":
            return {"test_size": 2}
        case "WordProblems" if data.get("init_args", {}).get("source") == "hub":
            rows = [json.dumps({"question": f"How many are {n} cups?", "answer": f"#### {n}"}) for n in range(40)]
            Path("train.jsonl").write_text("\n".join(rows))
            return SIZES | {"source": "file", "path": "train.jsonl", "test_sets": {"test": 4}}
        case "WordProblems":
            return SIZES | {"test_sets": dict.fromkeys(data.get("init_args", {}).get("test_sets", ["test"]), 8)}
    raise AssertionError(f"this test has no sizes for {data['class_path']}")


def small_model(model: dict[str, Any]) -> dict[str, Any]:
    match model["class_path"]:
        case "QuestionAnswering":
            return {"tokenizer": {"texts": 300}, "save_to": "made"}
        case "DeltaMemory":
            return {"ensemble": 2}
        case "GroundThink":
            return {"compile": False, "seq_len": min(model["init_args"]["seq_len"], LONG)}
        case "Separability":
            return {"ensemble": min(model["init_args"].get("ensemble", 1), 2), "compile": False}
        case "Telepathy" if not model["init_args"]["source"]["path"].startswith("assets/"):
            encoder, chat = make_real_pair()
            small: dict[str, Any] = {
                "source": {"path": encoder},
                "target": {"path": chat, "compile": False},
                "max_new_tokens": 8,
            }
            if "width" in model["init_args"]["bridge"]["init_args"]:
                sizes = {"width": 32, "heads": 2, "hidden": 32, "depth": 1}
                small |= {"source_layer": [1, 2], "bridge": {"init_args": sizes}}
            return small
        case "Telepathy":
            return {"max_new_tokens": 4}
    return {}


def make_real_pair() -> tuple[str, str]:
    """Folders of a tiny encoder and a tiny chat model, in place of those that benchmarks/real_pair.py downloads."""
    tokenizer = AutoTokenizer.from_pretrained("assets/pair/source")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained("encoder")
    tokenizer.save_pretrained("encoder")
    template = "{{ bos_token }}{{ messages[0]['content'] }}\n"
    Path(shutil.copytree("assets/pair/target", "chat"), "chat_template.jinja").write_text(template)
    return "encoder", "chat"


@pytest.fixture
def launch(workplace) -> Callable[..., CrosstalkCLI]:
    """Runs a command line as it is, except that one overlay more makes all sizes small."""

    def call(line: list[str], **trainer: Any) -> CrosstalkCLI:
        options = zip(line[1::2], line[2::2], strict=True)
        config, *overlays = [read(path) for option, path in options if option == "--config"]
        for part, overlay in [(part, overlay) for part in ("data", "model") for overlay in overlays]:
            config[part] = config[part] | {
                "init_args": config[part].get("init_args", {}) | overlay.get(part, {}).get("init_args", {})
            }
        small = {part: {"init_args": by(config[part])} for part, by in (("data", small_data), ("model", small_model))}
        Path("small.yaml").write_text(yaml.safe_dump(small | {"trainer": TRAINER | trainer}))
        return cli.main([*line, "--config", "small.yaml"])

    return call


def test_there_are_configs():
    assert {"telepathy_v15", "telepathy_v16", "telepathy_v18", "pair_source", "pair_target"} <= set(CONFIGS)
    assert {f"separability_{task}" for task in ("interleaved", "grokking", "grokking_small", "text")} <= set(CONFIGS)
    of_separability = ("reference", "clamp_naive", "clamp_mean_preserving", "noise", "freeze_routing")
    names = ["ddp", "debug", "fsdp", "h100x8", "profile", "telepathy/gates", "telepathy/llama31_mistral7b"]
    names += [*(f"separability/{name}" for name in of_separability)]
    assert {f"configs/presets/{name}.yaml" for name in names} <= set(PRESETS)


def command_of(name: str) -> str:
    """The command on a config's first line: `test` if there is nothing to train."""
    return "test" if name == "delta_mechanism" else "fit"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_runs_as_it_is(launch, name):
    done = launch([command_of(name), "--config", f"configs/{name}.yaml"], fast_dev_run=True)
    assert done.trainer.global_step == (1 if command_of(name) == "fit" else 0)
    assert any(metric.startswith("test/") for metric in done.trainer.callback_metrics)
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_how_it_is_run_and_for_how_long(name):
    path = f"configs/{name}.yaml"
    assert first_line(path) == f"# python main.py {command_of(name)} --config {path}"
    assert command_of(name) == "test" or read(path)["trainer"]["max_steps"] > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_the_first_line_of_a_preset_resolves_as_it_is_written(workplace, preset):
    for line in commands_of(preset):
        resolved = resolve(*line)
        assert resolved["trainer"]["callbacks"]
        assert resolved["data"]
    assert preset in line


def flaws_in_the_docs(version: str) -> list[str]:
    """The flaws of a version in the table of docs/telepathy_ladder.md, where V8 and V9 have `those of V7` and more."""
    row, *_ = re.findall(rf"^\| {version} \|[^|]*\|([^|]*)\|", (ROOT / "docs/telepathy_ladder.md").read_text(), re.M)
    earlier = re.match(r" those of (V\d+)", row)
    return (flaws_in_the_docs(earlier[1]) if earlier else []) + re.findall("`([a-z_]+)`", row)


@pytest.mark.parametrize("preset", LADDER)
def test_a_version_of_the_notes_runs_and_names_its_flaws(launch, preset):
    (line,) = commands_of(preset)
    done = launch(line, fast_dev_run=True)
    assert done.trainer.global_step == 1
    assert any(metric.startswith("test/") for metric in done.trainer.callback_metrics)
    _, _, flaws = (ROOT / preset).read_text().partition("\n# Its flaws: ")
    assert done.model.flaws == frozenset()
    assert flaws or preset.endswith("v17.yaml")  # which is not in the notes
    if flaws:
        model = resolve(*line, *shlex.split(flaws.splitlines()[0]))["model"]["init_args"]
        named = model["reproduce_flaws"]
        assert set(named) <= set(get_args(Flaw))
        assert {FLAW_OF[flaw] for flaw in named if flaw in FLAW_OF} <= set(model["objectives"])
        assert flaws_in_the_docs(Path(preset).stem.upper()) == named


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - set(LADDER)))
def test_a_preset_runs_over_the_config_that_its_first_line_names(launch, preset):
    *preparations, line = commands_of(preset)
    command, *options = line
    assert options[0::2] == ["--config", "--config"]
    assert options[3] == preset
    for preparation in preparations:
        launch(preparation, **SIX_STEPS)

    overlay = read(preset)
    done = launch(line, **SIX_STEPS | {"limit_val_batches": int(command == "validate")})
    assert done.trainer.global_step == (6 if command == "fit" else 0)
    tested = any(metric.startswith("test/") for metric in done.trainer.callback_metrics)
    assert tested == (command != "validate" and overlay.get("test_after_fit", True))
    present = [type(callback).__name__ for callback in done.trainer.callbacks]
    # An overlay adds callbacks and replaces none
    trainer = overlay.get("trainer", {})
    added = trainer.pop("callbacks+", [])
    assert {callback["class_path"] for callback in read(options[1])["trainer"]["callbacks"] + added} < set(present)
    for key, value in trainer.items():
        set_to = done.config[command]["trainer"][key]
        if key not in {*SIX_STEPS, "devices", "precision"}:
            assert set_to["class_path"].endswith(value["class_path"]) if isinstance(value, dict) else set_to == value


def test_a_clamp_reads_the_file_that_the_reference_preset_writes():
    folder = "configs/presets/separability"
    (recorder,) = read(f"{folder}/reference.yaml")["trainer"]["callbacks+"]
    for name in ("clamp_naive", "clamp_mean_preserving"):
        (clamp,) = read(f"{folder}/{name}.yaml")["trainer"]["callbacks+"]
        assert clamp["init_args"]["reference"] == recorder["init_args"]["path"]
        assert commands_of(f"{folder}/{name}.yaml")[0] == commands_of(f"{folder}/reference.yaml")[0]


def test_a_finished_run_is_tested_under_noise(launch):
    config = ["--config", "configs/separability_interleaved.yaml"]
    trained = launch(["fit", *config], **SIX_STEPS)
    checkpoint = trained.run_dir / "checkpoints" / "last.ckpt"
    noise = ["--config", "configs/presets/separability/noise.yaml", "--ckpt_path", str(checkpoint)]
    noisy = launch(["test", *config, *noise], **SIX_STEPS)
    assert noisy.trainer.global_step == 0
    length = "test/a_act"
    assert noisy.trainer.callback_metrics[length] > trained.trainer.callback_metrics[length]


def test_presets_of_a_line_go_with_configs_of_that_line():
    for preset in PRESETS:
        folder = Path(preset).parent.name
        for command in commands_of(preset):
            assert folder == "presets" or Path(command[2]).stem.startswith(f"{folder}_")
