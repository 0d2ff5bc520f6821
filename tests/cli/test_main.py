"""The program itself: commands, their overview, and how it ends."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

import main
from cli import commands

LIGHT = "import sys; sys.argv = ['main.py']; import main; main.program(); print('torch' in sys.modules)"


def start(*args: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *args], cwd=ROOT, text=True, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("line", [[], ["-h"], ["--help"]], ids=["bare", "short", "long"])
def test_the_overview_lists_every_command(line, capsys):
    assert main.main(line) is None
    text = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "generate", "export", "study", "ledger"):
        assert f"\n  {command} " in text
    assert "python main.py fit --config" in text


def test_the_overview_needs_no_torch():
    process = start("-c", LIGHT, stdout=subprocess.PIPE)
    out, errors = process.communicate(timeout=60)
    assert out.endswith("False\n")
    assert errors == ""


@pytest.mark.parametrize(("word", "near"), [("fti", "'fit'"), ("leger", "'ledger'"), ("zzz", "")])
def test_a_wrong_command_names_the_nearest(word, near, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main([word])
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert f"no command '{word}'" in errors
    assert (f"did you mean {near}?" in errors) == bool(near)
    assert "fit, validate, test, predict, generate, export, study, ledger" in errors


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--data.seed", "5", "fit"], "the command comes first, before --data.seed: python main.py fit"),
        (["--config", "x.yaml", "study"], "the command comes first, before --config: python main.py study"),
        (["-x"], "the command comes first, before -x\n"),
    ],
)
def test_options_before_the_command_are_told(line, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(line)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["generate", "--ckpt_path", "x", "--promt", "hi"], "there is no option --promt; did you mean '--prompt'?"),
        (["export", "--ckpt_pat=x"], "there is no option --ckpt_pat; did you mean '--ckpt_path'?"),
        (["generate", "--ckpt_path", "x"], "one of the arguments --prompt --file is required"),
    ],
)
def test_a_wrong_name_of_a_required_option_is_told(line, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(line)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_reader_that_ends_early_leaves_no_trace():
    reading, writing = os.pipe()
    os.close(reading)
    process = start("main.py", "--help", stdout=writing)
    os.close(writing)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 141


def test_another_broken_pipe_is_a_bug(monkeypatch):
    monkeypatch.setattr(main, "main", raiser(BrokenPipeError()))
    monkeypatch.setattr(main, "reader_is_gone", lambda: False)
    with pytest.raises(BrokenPipeError):
        main.program()


def test_control_c_amid_imports_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(main, "main", raiser(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as ended:
        main.program()
    assert ended.value.code == 130


def test_a_help_page_imports_torchmetrics_alone(monkeypatch):
    said = "import sys; from cli.commands import speed_up_help; speed_up_help(['fit', '--help'])"
    process = start("-c", f"{said}; print([m for m in ('scipy', 'transformers') if m in sys.modules])", stdout=-1)
    assert process.communicate(timeout=60)[0] == "[]\n"
    monkeypatch.setattr("cli.help_imports.import_torchmetrics_alone", raiser(AssertionError()))
    commands.speed_up_help(["fit", "--config", "help.yaml"])
    with pytest.raises(AssertionError):
        commands.speed_up_help(["fit", "--model.help=Telepathy"])


def raiser(error: BaseException):
    def fail() -> None:
        raise error

    return fail
