"""A checkpoint's vocabulary reads another text, also one with more characters than the model has tokens."""

import json
import warnings
from pathlib import Path

import pytest
import yaml

import main

MODEL = {"vocab_size": 40, "seq_len": 16, "width": 16, "heads": 2, "pattern": "G"}
DATA = {"source": "file", "path": "text.txt", "level": "char", "seq_len": 16}
DATA |= {"batch_size": 4, "validation_size": 4, "test_size": 4}
TRAINER = {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False}
TEXT = "the cat sat on the mat, or so. " * 60


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> str:
    """Return the path of a checkpoint of a run on `text.txt`, whose config is `run.yaml`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])
    Path("text.txt").write_text(TEXT)
    classes = {"model": "Phase", "data": "TextCorpus"}
    config = {key: {"class_path": classes[key], "init_args": args} for key, args in (("model", MODEL), ("data", DATA))}
    Path("run.yaml").write_text(yaml.safe_dump(config | {"trainer": TRAINER, "test_after_fit": False}))
    main.main(["fit", "--config", "run.yaml", "--trainer.default_root_dir", "run"])
    return "run/checkpoints/last.ckpt"


@pytest.mark.parametrize("command", ["test", "fit"])
def test_a_text_with_more_characters_than_the_model_has_tokens(checkpoint, command, capsys):
    Path("other.txt").write_text("".join(map(chr, range(0x4E00, 0x4E64))) * 2 + TEXT)
    line = [command, "--config", "run.yaml", "--data.path", "other.txt", "--ckpt_path", checkpoint]
    capsys.readouterr()
    main.main([*line, "--trainer.max_steps", "3", "--trainer.default_root_dir", command])
    record = json.loads(Path(command, "results.json").read_text())
    assert record["status"] == "finished"
    assert "test/loss" in record["metrics"] if command == "test" else record["steps"] == 3
    assert capsys.readouterr().err.count("TextCorpus: chance is") <= 1  # the text is read once


def test_checkpoints_of_members_hold_the_vocabulary(checkpoint, capsys):
    line = ["--config", "run.yaml", "--model.ensemble", "2", "--seed_everything", "7"]
    main.main(["fit", *line, "--model.save_members", "true", "--trainer.default_root_dir", "pair"])
    Path("text.txt").unlink()
    capsys.readouterr()
    texts = []
    for path, more in (("pair/checkpoints/last.ckpt", ["--member", "1"]), ("pair/members/8.ckpt", line[:2])):
        main.main(["generate", "--ckpt_path", path, "--prompt", "the ", "--max_new_tokens", "9", *more])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("text", "warned"), [(TEXT, False), ("0123" + TEXT, True)])
def test_a_start_with_another_vocabulary_is_told(checkpoint, text, warned):
    Path("other.txt").write_text(text)
    line = ["fit", "--config", "run.yaml", "--data.path", "other.txt", "--model.start", checkpoint]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main.main([*line, "--trainer.default_root_dir", "started"])
    told = [str(warning.message) for warning in caught if "model.start" in str(warning.message)]
    wanted = f"model.start: {checkpoint} was trained with another vocabulary than this text has"
    assert len(told) == warned
    assert not warned or told[0].startswith(wanted)
