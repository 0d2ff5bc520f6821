"""A bridge as one file: a program without this project answers with it, and other models are told."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import main
from cli.loaded import load

QUESTION = "Ann has 12 cups and buys 30 more. How many cups does Ann have?"
CKPT = "made/checkpoints/last.ckpt"
SIZES = {"data.batch_size": 8, "data.validation_size": 8, "trainer.accelerator": "cpu", "trainer.max_steps": 4}
SIZES |= {"trainer.enable_progress_bar": "false", "test_after_fit": "false", "trainer.limit_val_batches": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run of V16 and its exported bridge."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("assets", "configs"):
            shutil.copytree(ROOT / name, folder / name)
        patch.chdir(folder)
        patch.setattr("sys.argv", ["main.py"])
        small = [text for key, value in SIZES.items() for text in (f"--{key}", str(value))]
        main.main(["fit", "--config", "configs/telepathy_v16.yaml", *small, "--trainer.default_root_dir", "made"])
        main.main(["export", "--ckpt_path", CKPT, "--output", "bridge.safetensors"])
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, which a test may damage."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])
    return tmp_path


def program() -> list[str]:
    """The two parts of the program in the docs: to load, and to answer."""
    text = Path(ROOT, "docs", "telepathy_full_size.md").read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def change_weights(which: str) -> None:
    path = Path("assets/pair", which, "model.safetensors")
    state = load_file(path)
    name = next(name for name in state if name.endswith("layers.0.mlp.up_proj.weight"))
    state[name] = state[name] * 1.5
    save_file(state, path, {"format": "pt"})


def test_the_program_in_the_docs_answers_as_the_checkpoint_does(place, capsys):
    loading, answering = program()
    lines = [line for line in loading.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 10
    names: dict = {}
    exec(compile(loading + answering, "docs", "exec"), names)
    module, _ = load(CKPT, None)
    assert [names["answer"](QUESTION)] == module.answer([QUESTION], 100)
    assert capsys.readouterr().out.strip() == names["answer"](QUESTION)
    expected_BSC = module.source.read(module.source.tokenize([QUESTION]))
    torch.testing.assert_close(names["states"](QUESTION), expected_BSC[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("which", ["source", "target"])
def test_the_program_in_the_docs_tells_other_models(place, which):
    change_weights(which)
    with pytest.raises(AssertionError, match=f"the bridge was trained with another {which} than assets/pair/{which}"):
        exec(compile("".join(program()), "docs", "exec"), {})


def test_a_file_has_the_bridge_alone(place):
    with safe_open("bridge.safetensors", "pt") as file:
        names, about = set(file.keys()), json.loads(file.metadata()["crosstalk"])
    trained = torch.load(CKPT, weights_only=True)["state_dict"]
    assert names - set(trained) == {"probe.states", "probe.logits"}
    assert {name for name in trained if name.startswith(("bridge.", "soft_tokens."))} <= names
    assert about["config"]["init_args"]["bridge"]["init_args"]["hidden"] == 768
    assert about["source"]["layers"] == [1]
    assert len(about["source"]["fingerprint"]) == len(about["target"]["fingerprint"]) == 64


def test_the_command_generate_uses_checkpoint_and_file(place, capsys):
    module, _ = load(CKPT, None)
    questions = [QUESTION, "Bob has 2 dogs. How many dogs?"]
    Path("questions.txt").write_text("\n\n".join(questions))
    capsys.readouterr()
    for path in (CKPT, "bridge.safetensors"):
        main.main(["generate", "--ckpt_path", path, "--prompt", QUESTION, "--max_new_tokens", "30"])
        (single,) = module.answer([QUESTION], 30)
        assert capsys.readouterr().out.removesuffix("\n") == single
        main.main(["generate", "--ckpt_path", path, "--file", "questions.txt", "--max_new_tokens", "30"])
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line]
        assert [row["question"] for row in rows] == questions
        assert [row["answer"] for row in rows] == module.answer(questions, 30)


def fails(line: list[str], capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main.main(line)
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize("which", ["source", "target"])
def test_models_that_have_changed_are_told(place, which, capsys):
    change_weights(which)
    error = fails(["generate", "--ckpt_path", "bridge.safetensors", "--prompt", "x"], capsys)
    assert f"the bridge was trained with another {which} than 'assets/pair/{which}' is now" in error


def test_mistakes_end_in_one_sentence(place, capsys):
    generate = ["generate", "--prompt", "x", "--ckpt_path"]
    Path("cut.safetensors").write_bytes(Path("bridge.safetensors").read_bytes()[:1000])
    assert "--ckpt_path: cut.safetensors cannot be read" in fails([*generate, "cut.safetensors"], capsys)
    other = "assets/pair/source/model.safetensors"
    assert "was not written by `python main.py export`" in fails([*generate, other], capsys)
    assert "no file bridg.safetensors; did you mean bridge.safetensors?" in fails(
        [*generate, "bridg.safetensors"], capsys
    )
    Path("folder.safetensors").mkdir()
    assert "folder.safetensors is a folder" in fails([*generate, "folder.safetensors"], capsys)
    export = ["export", "--ckpt_path", CKPT, "--output"]
    assert "--output: folder.safetensors is a folder" in fails([*export, "folder.safetensors"], capsys)
    assert "--output: s3://x/b.safetensors is an address" in fails([*export, "s3://x/b.safetensors"], capsys)
    assert "--output: '~/nowhere/b.safetensors' is not expanded" in fails([*export, "~/nowhere/b.safetensors"], capsys)
    assert "--output: the path is empty" in fails([*export, ""], capsys)
    assert "--ckpt_path: expected the path of a checkpoint" in fails(["export", "--ckpt_path", ""], capsys)
    hot = [*generate, "bridge.safetensors", "--temperature", "1"]
    assert "--temperature: Telepathy takes the most likely token: leave it out" in fails(hot, capsys)
    assert "--prompt is empty" in fails(["generate", "--ckpt_path", "bridge.safetensors", "--prompt", " "], capsys)
    assert "--output: x.bin must end in .safetensors" in fails(
        ["export", "--ckpt_path", CKPT, "--output", "x.bin"], capsys
    )
    assert "is exported already" in fails(
        ["export", "--ckpt_path", "bridge.safetensors", "--output", "b.safetensors"], capsys
    )
    assert "--member: bridge.safetensors holds one model" in fails(
        [*generate, "bridge.safetensors", "--member", "0"], capsys
    )
    lines = ["generate", "--ckpt_path", CKPT, "--file"]
    assert "--file: none.txt cannot be read: No such file" in fails([*lines, "none.txt"], capsys)
    Path("empty.txt").write_text("\n")
    assert "--file: empty.txt holds no question" in fails([*lines, "empty.txt"], capsys)


def test_a_config_moves_the_models_of_a_file(place, capsys, monkeypatch):
    question = ["--prompt", QUESTION, "--max_new_tokens", "30"]
    main.main(["generate", "--ckpt_path", "bridge.safetensors", *question])
    expected = capsys.readouterr().out
    Path("assets").rename("elsewhere")
    generate = ["generate", "--ckpt_path", "bridge.safetensors", *question]
    assert "cannot load a model configuration from 'assets/pair/source'" in fails(generate, capsys)
    moved = {which: {"path": f"elsewhere/pair/{which}"} for which in ("source", "target")}
    Path("moved.yaml").write_text(json.dumps({"model": {"init_args": moved}}))
    main.main([*generate, "--config", "moved.yaml"])
    assert capsys.readouterr().out == expected


def test_a_config_of_another_bridge_ends_in_one_sentence(place, capsys):
    Path("other.yaml").write_text(json.dumps({"model": {"init_args": {"bridge": {"init_args": {"hidden": 64}}}}}))
    line = ["generate", "--ckpt_path", "bridge.safetensors", "--prompt", "x", "--config", "other.yaml"]
    assert "--ckpt_path: the bridge does not fit the config: size mismatch for bridge." in fails(line, capsys)


def test_another_config_than_that_of_a_checkpoint_is_told(place, capsys):
    Path("other.yaml").write_text(json.dumps({"model": {"init_args": {"source_layer": 3}}}))
    line = ["generate", "--ckpt_path", CKPT, "--prompt", "x", "--config", "configs/telepathy_v16.yaml"]
    with pytest.warns(UserWarning, match="made with model.source_layer 1, and this run has 3"):
        main.main([*line, "--config", "other.yaml"])


@pytest.mark.parametrize(("spoil", "message"), [("weights", "not finite"), ("about", "does not identify its source")])
def test_a_damaged_file_is_told(place, spoil: str, message: str, capsys):
    with safe_open("bridge.safetensors", "pt") as file:
        about = json.loads(file.metadata()["crosstalk"])
    tensors = load_file("bridge.safetensors")
    if spoil == "weights":
        tensors["soft_tokens.scale"] *= torch.nan
    else:
        del about["source"]["fingerprint"]
    save_file(tensors, "bridge.safetensors", {"crosstalk": json.dumps(about)})
    assert message in fails(["generate", "--ckpt_path", "bridge.safetensors", "--prompt", "x"], capsys)
