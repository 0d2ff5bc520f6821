"""The commands that run a model: what a run writes, and the sentences for mistakes."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from toy_cli import BASE, CliHead

import datamodules  # noqa: F401  (its classes are choices)
import lightning_modules.groundthink  # noqa: F401  (likewise)
import main
from cli.choices import subclasses


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs `main` in a folder that holds `base.yaml` alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    Path("base.yaml").write_text(yaml.safe_dump(BASE))
    return lambda command, *args: main.main([command, "--config", "base.yaml", *args])


@pytest.fixture
def refused(run, capsys):
    """Return a function that runs a command that must end in one sentence; it returns the sentence and the hint."""

    def check(*args: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(*args)
        assert ended.value.code == 2
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        assert "usage:" not in errors
        sentences = errors[errors.index("error: ") :].splitlines()
        assert len(sentences) <= 2
        return "\n".join(sentences)

    return check


def overlay(content: dict, name: str = "overlay.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(content))
    return name


WRONG_KEYS = {
    "cli": (["--model.init_args.outptu", "rms"], "CliModel has no argument 'outptu'", "'output'"),
    "cli short": (["--data.sorce", "x"], "CliData has no argument 'sorce' (data.sorce)", "'source'"),
    "trainer, no abbreviation": (["--trainer.max_step", "3"], "there is no key 'trainer.max_step'", "max_steps"),
    "nested": (["--model.head", "CliHead", "--model.head.soft_tokn", "1"], "(model.head.soft_tokn)", "'soft_tokens'"),
    "model": (["--model", "CliModl"], "there is no LightningModule 'CliModl'", "'CliModel'"),
    "callback": (["--trainer.callbacks+", "CliWacher"], "there is no Callback 'CliWacher'", "'CliWatcher'"),
    "optimizer": (["--model.optimizer", "AdamWW"], "model.optimizer: there is no Optimizer 'AdamWW'", "'AdamW'"),
    "optimizer argument": (
        ["--model.optimizer", "AdamW", "--model.optimizer.wieght_decay", "1"],
        "AdamW has no argument 'wieght_decay' (model.optimizer.wieght_decay)",
        "'weight_decay'",
    ),
    "required": (["--trainer.callbacks", "EarlyStopping"], "EarlyStopping needs a value for monitor", ""),
    "trainer flag": (["--trainer.strategy", "dpp"], "trainer: You selected an invalid strategy name", ""),
    "type": (["--model.width", "wide"], "model.width: expected int, got 'wide'", ""),
    "union": (["--model.layers", "x"], "model.layers: expected int or list[int], got 'x'", ""),
    "mapping": (["--model.losses", "3"], "model.losses: expected keys with values, got '3'", ""),
    "choice in a mapping": (["--model.losses", "maen"], "expected keys with values, got 'maen'", "'mean'"),
    "no config": (["--config", "bse.yaml"], "there is no file bse.yaml", "base.yaml"),
    "no checkpoint": (["--ckpt_path", "bse.yaml"], "there is no file bse.yaml", "base.yaml"),
}


@pytest.mark.parametrize("case", WRONG_KEYS)
def test_a_config_error_is_one_sentence_with_the_near_miss(refused, case):
    args, said, near = WRONG_KEYS[case]
    sentence = refused("fit", *args)
    assert said in sentence
    assert not near or f"did you mean {near}" in sentence or f"did you mean 'trainer.{near}'" in sentence
    assert not list(Path().rglob("results.json"))


WRONG_YAML = {
    "model argument": ({"model": {"init_args": {"outptu": "rms"}}}, "(model.outptu); did you mean 'output'?"),
    "top level": ({"modle": {"class_path": "CliModel"}}, "there is no key 'modle'; did you mean 'model'?"),
    "class": ({"data": {"class_path": "CliDta"}}, "there is no LightningDataModule 'CliDta'; did you mean 'CliData'?"),
    "callback argument": (
        {"trainer": {"callbacks+": [{"class_path": "CliWatcher", "init_args": {"every_steps": 1}}]}},
        "CliWatcher has no argument 'every_steps' (trainer.callbacks.every_steps); did you mean 'every_n_steps'?",
    ),
    "value of a callback": (
        {"trainer": {"callbacks+": [{"class_path": "CliWatcher", "init_args": {"every_n_steps": "x"}}]}},
        "trainer.callbacks: CliWatcher.every_n_steps: expected int, got 'x'",
    ),
}


def test_one_of_several_callbacks_of_a_class_is_named_by_its_number(refused):
    def watcher(**arguments):
        return {"class_path": "CliWatcher", "init_args": arguments}

    several = [watcher(every_n_steps=1), watcher(every_n_steps="x"), watcher()]
    said = "trainer.callbacks[1]: CliWatcher.every_n_steps: expected int, got 'x'"
    assert said in refused("fit", "--config", overlay({"trainer": {"callbacks": several}}))
    several[1] = watcher(every_steps=1)
    said = "CliWatcher has no argument 'every_steps' (trainer.callbacks[1].every_steps); did you mean 'every_n_steps'?"
    assert said in refused("fit", "--config", overlay({"trainer": {"callbacks": several}}))


@pytest.mark.parametrize("case", WRONG_YAML)
def test_a_typo_in_yaml_is_found_at_any_depth(refused, run, case):
    content, said = WRONG_YAML[case]
    assert said in refused("fit", "--config", overlay(content))


def test_an_overlay_alone_lacks_its_class(refused):
    overlay({"model": {"init_args": {"width": 3}}}, "base.yaml")
    errors = refused("fit")
    assert "model.width: no config names a class for 'model'" in errors
    assert "--help" in errors  # and not that LightningModule takes no arguments


def test_an_abstract_class_is_no_choice():
    choices = subclasses("LightningDataModule") | subclasses("LightningModule")
    assert not {"SequenceTask", "SequenceModel", "SequenceEvaluation", "EnsembleModule"} & choices
    assert {"Mixture", "GroundThink"} <= choices


UNREADABLE = {
    "a folder": (None, "--config: wrong.yaml is not a file"),
    "no YAML": (b"model: [unclosed\n", "wrong.yaml is not valid YAML near line"),
    "no keys": (b"- model\n", "wrong.yaml does not consist of keys and values"),
    "empty": (b"", "wrong.yaml does not consist of keys and values"),
    "no text": (b"\xff\xfemodel", "the config file wrong.yaml is not a text in UTF-8 ('utf-8' codec"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_config_file_is_named(refused, case):
    content, said = UNREADABLE[case]
    Path("wrong.yaml").mkdir() if content is None else Path("wrong.yaml").write_bytes(content)
    assert said in refused("fit", "--config", "wrong.yaml")


REFUSED = {
    "seed": (["--seed_everything", "-1"], "seed_everything: -1 is not in bounds"),
    "trainer": (["--trainer.devices", "x"], "trainer: `devices` selected with `CPUAccelerator`"),
    "callback": (["--trainer.callbacks+", "EMAWeightAveraging", "--trainer.callbacks.decay", "5"], "Invalid decay"),
    "optimizer": (["--model.optimizer", "SGD", "--model.optimizer.lr", "-1"], "SGD: Invalid learning rate"),
    "folder": (["--trainer.default_root_dir", "base.yaml/run"], "trainer.default_root_dir: cannot make the folder"),
    "logger": (
        ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "base.yaml/x"],
        "save_dir: cannot",
    ),
    "checkpoint folder": (["--ckpt_path", "."], "--ckpt_path: . is a folder and not a sharded checkpoint"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_value_that_a_library_refuses_is_one_sentence(refused, case):
    args, said = REFUSED[case]
    assert said in refused("fit", *args)
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.*"))


def test_a_runs_folder_that_cannot_be_made_is_named(refused):
    Path("runs").write_text("")
    assert "cannot make a folder for the run" in refused("fit")


def test_a_file_that_no_run_has_written_is_no_checkpoint(refused):
    torch.save({"weights": torch.zeros(2)}, "weights.ckpt")
    assert "weights.ckpt" in refused("fit", "--ckpt_path", "weights.ckpt")


def test_overlays_add_callbacks_and_short_keys_reach_init_args(run):
    added = {"trainer": {"callbacks+": [{"class_path": "LearningRateMonitor"}]}}
    done = run("fit", "--config", overlay(added), "--data.source", "jsonl")
    names = [type(callback).__name__ for callback in done.trainer.callbacks]
    assert {"CliWatcher", "LearningRateMonitor", "RunRecord"} <= set(names)
    assert done.datamodule.source == "jsonl"


def test_a_run_has_its_folder_and_tests_after_fit(run):
    first, second = run("fit"), run("fit")
    assert first.run_dir != second.run_dir
    assert first.run_dir.parent == Path("runs/base")
    files = {str(file.relative_to(first.run_dir)) for file in first.run_dir.rglob("*")}
    assert {"config.yaml", "results.json", "checkpoints/last.ckpt"} <= files
    assert any(name.startswith("events.out") for name in files)
    record = yaml.safe_load((first.run_dir / "results.json").read_text())
    assert set(record["seconds"]) == {"fit", "test"}
    assert record["metrics"]["test/accuracy"] == 0.5
    again = main.main(["fit", "--config", str(first.run_dir / "config.yaml"), "--test_after_fit", "false"])
    assert again.run_dir.parent == Path("runs/base")
    assert "test" not in again.record.record["seconds"]


def test_the_users_folder_is_used_and_never_shared(run, refused):
    assert run("fit", "--trainer.default_root_dir", "mine").run_dir is None
    assert Path("mine/results.json").exists()
    assert Path("mine/checkpoints/last.ckpt").exists()
    assert "mine already holds a run" in refused("fit", "--trainer.default_root_dir", "mine")


def test_a_fast_dev_run_leaves_nothing(run):
    run("fit", "--trainer.fast_dev_run", "true")
    assert not Path("runs").exists()


@pytest.fixture
def checkpoint(run):
    return run("fit", "--model.output", "none").run_dir / "checkpoints" / "last.ckpt"


def test_the_users_config_wins_over_the_checkpoints(run, checkpoint, recwarn):
    done = run("fit", "--ckpt_path", str(checkpoint), "--trainer.max_steps", "3")
    assert done.model.hparams.output == "rms"
    assert done.trainer.global_step == 3
    assert not [warning for warning in recwarn if "dirpath" in str(warning.message)]


def test_a_checkpoint_of_another_width_is_refused_in_words(run, refused, checkpoint):
    before = list(Path("runs/base").iterdir())
    sentence = refused("test", "--ckpt_path", str(checkpoint), "--model.width", "3")
    assert "layer.weight is [2, 32] there and [3, 32] in the model" in sentence
    assert list(Path("runs/base").iterdir()) == before


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_refused_naming_the_intact_one(refused, checkpoint, damage):
    content = bytearray(checkpoint.read_bytes())
    middle = content.index(b"state_dict")
    content[middle] ^= 0xFF
    damaged = checkpoint.with_name("newer.ckpt")
    damaged.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    shutil.copy(checkpoint, checkpoint.with_name("newest.ckpt"))
    sentence = refused("fit", "--ckpt_path", str(damaged))
    assert "newer.ckpt is damaged" in sentence
    assert "newest intact one beside it is" in sentence
    assert "newest.ckpt" in sentence


def test_a_checkpoint_that_may_run_code_needs_consent(run, refused, checkpoint):
    torch.save(torch.load(checkpoint, weights_only=True) | {"extra": CliHead()}, checkpoint)
    assert "--weights_only false" in refused("fit", "--ckpt_path", str(checkpoint))
    options = ["--trainer.max_steps", "3", "--weights_only", "false"]
    assert run("fit", "--ckpt_path", str(checkpoint), *options).trainer.global_step == 3


@pytest.mark.parametrize("args", [["--data.fault", "user"], ["--model.width", "0"]], ids=["setup", "init"])
def test_a_mistake_found_at_run_time_leaves_no_folder(refused, args):
    assert refused("fit", *args).count(": expected") == 1
    assert not list(Path("runs").rglob("*.*"))


def test_a_bug_keeps_its_stack_trace(run):
    with pytest.raises(ValueError, match="invalid literal"):
        run("fit", "--data.fault", "bug")
    (record,) = Path("runs").rglob("results.json")
    assert yaml.safe_load(record.read_text())["status"] == "failed"


def test_exhausted_memory_is_one_sentence(run, capsys):
    with pytest.raises(SystemExit) as ended:
        run("fit", "--data.fault", "memory")
    assert ended.value.code == 1
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("error: out of memory (the last allocation was of 2.00 GiB): lower data.batch_size")
    (record,) = Path("runs").rglob("results.json")
    assert yaml.safe_load(record.read_text())["status"] == "failed"


def test_control_c_while_the_model_is_built_leaves_no_folder(run):
    with pytest.raises(KeyboardInterrupt):
        run("fit", "--model.width", "-7")
    assert not list(Path("runs").rglob("*-*"))


def test_help_begins_with_the_commands(run, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["fit", "--help"])
    assert ended.value.code == 0
    assert "python main.py fit --config configs/X.yaml" in "\n".join(capsys.readouterr().out.splitlines()[:8])


def test_a_run_without_checkpoints(run):
    options = ["--trainer.enable_checkpointing", "false", "--trainer.max_steps", "1", "--test_after_fit", "false"]
    done = run("fit", *options, "--trainer.limit_val_batches", "0")
    assert done.trainer.global_step == 1
    assert not list(done.log_dir.rglob("*.ckpt"))
