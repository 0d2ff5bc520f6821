"""The command `generate`: text from a run's checkpoint, and a sentence for each mistake."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from toy_cli import CliModel

import main
from cli.generate import HELP
from datamodules import TextCorpus
from lightning_modules.core.generation import Sampling
from lightning_modules.core.text_stream import Vocabulary, stream_text
from lightning_modules.phase import Phase

MODEL = {"vocab_size": 40, "seq_len": 16, "width": 16, "heads": 2, "pattern": "PAG"}
DATA = {"source": "file", "path": "text.txt", "level": "char", "seq_len": 16}
DATA |= {"batch_size": 4, "validation_size": 4, "test_size": 4}
TRAINER = {"max_steps": 2, "limit_val_batches": 0, "accelerator": "cpu", "enable_progress_bar": False}


def spec(name: str, arguments: dict) -> dict:
    return {"class_path": name, "init_args": arguments}


def fit(model: dict, data: dict, folder: str, kind: str = "TextCorpus") -> Path:
    config = {"model": spec("Phase", model), "data": spec(kind, data), "trainer": TRAINER}
    Path(f"{folder}.yaml").write_text(yaml.safe_dump(config | {"test_after_fit": False}))
    main.main(["fit", "--config", f"{folder}.yaml", "--trainer.default_root_dir", folder])
    return Path(folder, "checkpoints", "last.ckpt").resolve()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return a folder with a text, and with the runs `char`, `byte` and `pair`; the last has two members."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["main.py"])
        Path("text.txt").write_text("the cat sat on the mat, 'è' or so. " * 60)
        fit(MODEL, DATA, "char")
        fit(MODEL | {"vocab_size": 256}, DATA | {"level": "byte"}, "byte")
        fit(MODEL | {"ensemble": 2, "save_members": True}, DATA, "pair")
    return folder


@pytest.fixture
def generate(trained, tmp_path, monkeypatch, capsys):
    """Return a function that runs the command in a folder of its own, and returns what it prints."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(*args: str, run: str = "char") -> str:
        capsys.readouterr()
        main.main(["generate", "--ckpt_path", f"{run}/checkpoints/last.ckpt", *args])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(generate, capsys):
    """Return a function that runs the command, which must end in one sentence, and returns that sentence."""

    def check(*args: str, **options: str) -> str:
        with pytest.raises(SystemExit) as ended:
            generate(*args, **options)
        assert ended.value.code == 2
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        assert errors.startswith("error: ")
        return errors

    return check


def network_of(run: str) -> tuple[Phase, TextCorpus]:
    content = torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)
    config = content["config"]
    module, data = Phase(**config["model"]["init_args"] | {"optimizer": torch.optim.AdamW}), TextCorpus(**DATA)
    module.load_state_dict(content["state_dict"])
    return module.eval(), data


def test_the_text_is_the_continuation_by_the_model(generate):
    out = generate("--prompt", "the ", "--max_new_tokens", "30", "--temperature", "0")
    module, data = network_of("char")
    tokens_BT = torch.tensor([data.parse("the ")])
    for _ in range(30):  # the whole row again for each token
        next_B1 = module(tokens_BT)[:, -1:, : data.vocab_size].argmax(2)
        tokens_BT = torch.cat([tokens_BT, next_B1], 1)
    assert out == data.decode(tokens_BT[0].tolist()) + "\n"
    assert len(out) == 4 + 30 + 1


def test_the_seed_and_the_options_decide_the_samples(generate):
    texts = [generate("--prompt", "the ", "--seed", seed, "--max_new_tokens", "40") for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    greedy = generate("--prompt", "the ", "--temperature", "0", "--max_new_tokens", "40")
    assert generate("--prompt", "the ", "--top_k", "1", "--max_new_tokens", "40") == greedy
    assert generate("--prompt", "the ", "--top_p", "1e-6", "--max_new_tokens", "40") == greedy


def test_the_text_of_the_run_is_not_needed(generate):
    expected = generate("--prompt", "the ")
    Path("text.txt").unlink()
    assert generate("--prompt", "the ") == expected


def test_bytes_are_printed_as_whole_characters(generate):
    out = generate("--prompt", "è ", "--max_new_tokens", "60", "--temperature", "5", run="byte")
    assert out.startswith("è ")
    out.encode()  # no half characters


def test_a_member_of_an_ensemble(generate, refused):
    assert "holds 2 members, and generate takes one: add --member" in refused("--prompt", "the ", run="pair")
    assert "--member must be at most 1, not 2" in refused("--prompt", "the ", "--member", "2", run="pair")
    member = str(next(iter(sorted(Path("pair/members").glob("*.ckpt")))))
    assert "holds no config of a run: name it with --config" in refused("--prompt", "the ", "--ckpt_path", member)
    out = generate("--prompt", "the ", "--ckpt_path", member, "--config", "char.yaml")
    assert len(out) == 4 + 500 + 1
    assert generate("--prompt", "the ", "--ckpt_path", member, "--config", "pair/config.yaml") == out
    assert generate("--prompt", "the ", "--member", "0", run="pair") == out
    assert generate("--prompt", "the ", "--member", "1", run="pair") != out


def test_mistakes_end_in_one_sentence(refused):
    assert "the vocabulary of the model lacks 'T' 'z': leave out" in refused("--prompt", "The zoo")
    assert "--prompt is empty" in refused("--prompt", "")
    assert "--prompt is no text in UTF-8" in refused("--prompt", "a\udcff", run="byte")
    assert "--max_new_tokens must be at least 1, not 0" in refused("--prompt", "the", "--max_new_tokens", "0")
    assert "--temperature must be at least 0" in refused("--prompt", "the", "--temperature", "-1")
    assert "--top_k must be at least 1" in refused("--prompt", "the", "--top_k", "0")
    assert "--seed must be an integer from 0" in refused("--prompt", "the", "--seed", "-1")
    assert "did you mean '--prompt'?" in refused("--prompt", "the", "--promt", "x")
    assert "--ckpt_path" in refused("--prompt", "the", "--ckpt_path", "none.ckpt")
    assert "one of the arguments --prompt --file is required" in refused()


def test_a_checkpoint_that_does_not_fit_or_is_no_sequence_model(refused):
    content = torch.load("char/checkpoints/last.ckpt", weights_only=True)
    content["config"]["model"]["init_args"]["width"] = 32
    torch.save(content, "wide.ckpt")
    assert "does not fit the config: network." in refused("--prompt", "the", "--ckpt_path", "wide.ckpt")
    content["config"]["model"] = spec("toy_cli.CliModel", {})
    content["state_dict"] = CliModel().state_dict()
    torch.save(content, "other.ckpt")
    assert "is of CliModel, which is no sequence model" in refused("--prompt", "the", "--ckpt_path", "other.ckpt")


def test_the_text_of_a_mixture(generate, refused):
    needles = spec("NeedleGym", {"needles": 2, "seq_len": 16, "vocab_size": 40, "batch_size": 4})
    fit(MODEL | {"vocab_size": 40}, {"tasks": [spec("TextCorpus", DATA), needles]}, "mixed", "Mixture")
    Path("text.txt").write_text("other")
    assert generate("--prompt", "the ", run="mixed").startswith("the ")
    assert "the vocabulary of the model lacks 'z'" in refused("--prompt", "z", run="mixed")
    fit(MODEL | {"vocab_size": 40}, {"tasks": [needles]}, "needles", "Mixture")
    with pytest.warns(UserWarning, match="NeedleGym has labels that are answers, so Phase has"):
        text = generate("--prompt", "1 2", "--max_new_tokens", "3", run="needles")
    assert re.fullmatch(r"1 2( \d+){3}\n", text)
    assert "--prompt: 'a' is not a row of numbers from 0 to 39" in refused("--prompt", "a", run="needles")


def test_help_reads_well(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["generate", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert HELP.splitlines()[0] in text
    for option in ("--ckpt_path", "--prompt", "--max_new_tokens", "--temperature", "--top_k", "--top_p", "--seed"):
        assert f"\n  {option} " in text


class Counts:
    """A network whose next token is the one after its last token; its state is the length of what it has read."""

    def __init__(self, size: int):
        self.size = size

    def init_state(self, batch: int) -> int:
        return 0

    def step(self, token_B, state: int):
        logits_BV = torch.zeros(1, self.size)
        logits_BV[0, (token_B + 1) % self.size] = 1
        logits_BV[0, -1] = 9 if self.size > 300 else logits_BV[0, -1]
        return logits_BV, state + 1


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("aé€😀".encode(), ["a", "é", "€", "😀"]),
        (b"\xff\xff\xff\xe2\x82\xacA", ["�", "�", "�", "€", "A"]),
        (b"\xff\xfe\xfd\xf0\x9f\x98\x80B", ["�", "�", "�", "😀", "B"]),
        (b"\xe2\x82\xe2\x82\xac\xf0\x9f", ["�", "€", "�"]),
    ],
)
def test_a_piece_ends_where_a_character_ends(tokens: bytes, expected: list[str]):

    class Script(Counts):
        def step(self, token_B, state: int):
            logits_BV = torch.zeros(1, 256)
            logits_BV[0, tokens[state]] = 1
            return logits_BV, state + 1

    decode = lambda tokens: bytes(tokens).decode(errors="replace")  # noqa: E731
    pieces = list(stream_text(Script(256), torch.tensor([[98]]), len(tokens), decode))
    assert pieces == expected
    spaced = lambda tokens: " ".join(map(str, tokens))  # noqa: E731
    assert list(stream_text(Counts(9), torch.tensor([[3]]), 3, spaced)) == [" 4", " 5", " 6"]


def test_tokens_that_the_data_does_not_have_are_never_chosen():
    network = Vocabulary(Counts(400), 300)
    pieces = list(stream_text(network, torch.tensor([[5]]), 20, lambda tokens: f" {tokens[-1]}", Sampling(0)))
    assert len(pieces) == 20
    assert network.step(torch.tensor([5]), 0)[0].shape == (1, 300)
    assert network.step(torch.tensor([5]), 0)[0].argmax() == 6
