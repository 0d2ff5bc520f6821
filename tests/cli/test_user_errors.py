"""Mistakes in a telepathy run: each ends in one sentence and exit code 2, and leaves no file."""

import json
from pathlib import Path

import pytest

from datamodules.problems import generate


@pytest.fixture
def refused(run, capsys):
    """Return a function that runs a command that must be refused; it returns the sentence."""

    def check(*args: object, config: str = "telepathy_v15") -> str:
        with pytest.raises(SystemExit) as ended:
            run("fit", config, *args)
        errors = capsys.readouterr().err
        assert ended.value.code == 2
        assert "Traceback" not in errors
        assert "usage:" not in errors
        assert not Path("runs").exists() or not list(Path("runs").rglob("*.*"))
        said = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(said) == 1
        return said[0].removeprefix("error: ")

    return check


def write(path: str, lines: list[str]) -> str:
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def good(count: int) -> list[str]:
    problems = [generate(0, "train", index) for index in range(count)]
    return [json.dumps({"question": problem.question, "answer": problem.answer}) for problem in problems]


def jsonl(path: str) -> list[str]:
    return ["--data.source", "file", "--data.path", path]


FIELDS = {
    "module": (["--model.outptu", "rms"], "Telepathy has no argument 'outptu'", "'output'"),
    "bridge": (["--model.bridge.soft_tokns", "8"], "PerceiverBridge has no argument 'soft_tokns'", "'soft_tokens'"),
    "data": (["--data.bacth_size", "8"], "WordProblems has no argument 'bacth_size'", "'batch_size'"),
    "source": (["--model.source.pth", "x"], "no argument 'source.pth'", "'source.path'"),
    "bridge class": (["--model.bridge", "PerceiverBrige"], "'PerceiverBrige'", "'PerceiverBridge'"),
    "data class": (["--data", "WordProblms"], "there is no LightningDataModule 'WordProblms'", "'WordProblems'"),
    "output": (["--model.output", "rmss"], "model.output: expected one of rms, tanh, none, got 'rmss'", "'rms'"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_wrong_field_or_class_names_the_near_miss(refused, case):
    args, said, near = FIELDS[case]
    sentence = refused(*args)
    assert said in sentence
    assert f"did you mean {near}" in sentence or not near


VALUES = {
    "no soft tokens": (["--model.bridge.soft_tokens", "0"], "model.bridge.soft_tokens must be at least 1, not 0"),
    "heads": (["--model.bridge.heads", "97"], "is not divisible by 97 heads"),
    "layer": (["--model.source_layer", "77"], "source_layer 77 does not exist: 'assets/pair/source' has layers 1 to "),
    "layers": (["--model.source_layer", "[1, 99]"], "source_layer 99 does not exist"),
    "layer 0": (["--model.source_layer", "0"], "model.source_layer 0 names no layer"),
    "no objective": (["--model.objectives", "{}"], "model.objectives is empty"),
    "objective": (["--model.objectives", "{lm: 1, klt: 1}"], "model.objectives has no 'klt': choose among lm, "),
    "prompt": (["--model.prompt", "Answer:"], "model.prompt needs one '{question}'"),
    "model folder": (["--model.source.path", "assets/pair/sorce"], "cannot load"),
    "data file": (jsonl("nothing.jsonl"), "no data file at 'nothing.jsonl'"),
    "no data file": (["--data.source", "jsonl"], "data.source 'file' needs data.path"),
    "test set": (["--data.test_sets", "{tests: 8}"], "data.test_sets has no set 'tests'"),
    "max_steps": (["--trainer.max_steps", "-1"], "trainer.max_steps must be set"),
    "monitor": (["--trainer.callbacks", "[{class_path: DiversityMonitor, init_args: {site: soft_tokn}}]"], "soft_tokn"),
    "two monitors": (["--trainer.callbacks+", "DiversityMonitor"], "there are two DiversityMonitor"),
}


@pytest.mark.parametrize("case", VALUES)
def test_a_value_that_cannot_be_is_refused_in_words(refused, case):
    args, said = VALUES[case]
    assert said in refused(*args)


def test_a_bridge_of_no_soft_tokens_a_source_token(refused):
    sentence = refused("--model.bridge.tokens_per_source", "0", config="telepathy_v16")
    assert sentence == "model.bridge.tokens_per_source must be at least 1, not 0"


def test_data_files_without_a_problem(refused):
    assert refused(*jsonl(write("empty.jsonl", []))) == "'empty.jsonl' (data.path) holds no problem: it is empty"
    broken = write("broken.jsonl", ["{", '{"question": "q"}'])
    assert "'broken.jsonl' (data.path) holds no problem: first line 1" in refused(*jsonl(broken))
    assert "'one.jsonl' (data.path) holds too few problems" in refused(*jsonl(write("one.jsonl", good(1))))


def test_a_broken_line_is_skipped_and_named_by_its_number(run):
    lines = good(40)
    lines.insert(6, '{"question": "cut o')
    options = ["--trainer.max_steps", 2, "--trainer.limit_val_batches", 0, "--test_after_fit", "false"]
    with pytest.warns(UserWarning, match=r"'some.jsonl' \(data.path\): skipped 1 of 41 lines, first line 7"):
        done = run("fit", "telepathy_v15", *jsonl(write("some.jsonl", lines)), *options)
    assert done.trainer.global_step == 2


def test_lists_of_no_test_set(run):
    sizes = ["--data.test_sets", "{test: 1}", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    done = run("fit", "telepathy_v15", *sizes)  # one problem: nothing to shuffle, no group, no spread
    assert done.record.record["n"]["test/accuracy"] == 1
