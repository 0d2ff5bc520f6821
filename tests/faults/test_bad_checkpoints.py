"""Every file that is no checkpoint of use ends in one sentence and exit code 2, and changes no file."""

import builtins
import io
import os
import pickle
import socket
import struct
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from toy_cli import BASE

import main
from cli import checkpoint
from cli.app import CrosstalkCLI
from lightning_modules.separability import Separability

Content = dict[str, Any]
Change = Callable[[Content], object]
ADAM_LINE = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01"]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    """Return the bytes of a whole checkpoint of the toy model, with AdamW."""
    folder = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["main.py"])
        Path("base.yaml").write_text(yaml.safe_dump(BASE))
        main.main(["fit", "--config", "base.yaml", "--test_after_fit", "false", *ADAM_LINE])
    return next(folder.rglob("last.ckpt")).read_bytes()


@pytest.fixture
def place(tmp_path, monkeypatch, good) -> Path:
    """Change to a folder that holds a config, and the good checkpoint in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    Path("base.yaml").write_text(yaml.safe_dump(BASE))
    Path("good").mkdir()
    Path("good/good.ckpt").write_bytes(good)
    return tmp_path


def everything(folder: Path) -> dict[str, object]:
    """Return what is in a folder: content of files, targets of links, kinds of the rest."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        else:
            found[str(path)] = path.read_bytes() if path.is_file() else path.stat().st_mode
    return found


def refuse(capsys, line: list[str], said: str) -> str:
    """Run a command that must end in one sentence and leave everything as it was; return the sentence."""
    before = everything(Path.cwd())
    capsys.readouterr()
    commands = CrosstalkCLI.subcommands()
    with pytest.MonkeyPatch.context() as patch:
        # One parser instead of four, which take most of the time
        patch.setattr(CrosstalkCLI, "subcommands", staticmethod(lambda: {line[0]: commands[line[0]]}))
        with pytest.raises(SystemExit) as ended:
            main.main([line[0], "--config", "base.yaml", *line[1:]])
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert "Traceback" not in errors
    sentences = errors[errors.index("error: ") :].splitlines()
    assert len(sentences) == 1, sentences
    assert said in sentences[0]
    assert everything(Path.cwd()) == before
    return sentences[0]


# Files, made from the bytes of a good checkpoint


def zipped(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, value in members.items():
            archive.writestr(name.replace("__", "/"), value)
    return stream.getvalue()


def compressed(good: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    return stream.getvalue()


def with_pickle(good: bytes, code: Callable[[bytes], bytes]) -> bytes:
    """Return an archive with right checksums whose pickle is changed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(stream, "w") as archive:
        for name in source.namelist():
            value = source.read(name)
            archive.writestr(name, code(value) if name.endswith("data.pkl") else value)
    return stream.getvalue()


def flipped(good: bytes, share: float, count: int = 1) -> bytes:
    start = int(share * len(good))
    return good[:start] + bytes(255 - byte for byte in good[start : start + count]) + good[start + count :]


def old_format(good: bytes) -> bytes:
    stream = io.BytesIO()
    torch.save({"state_dict": {}}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def script(good: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl", "m/code/m.py"):
            archive.writestr(name, b"\x80\x02}.")
    return stream.getvalue()


def safetensors(good: bytes) -> bytes:
    header = b'{"layer.bias":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    return struct.pack("<Q", len(header)) + header + bytes(8)


class Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda good: b"", "is no checkpoint: it is empty"),
    "one byte": (lambda good: good[:1], "is damaged or was not written to its end"),
    "three bytes": (lambda good: good[:3], "is damaged or was not written to its end"),
    "a tenth": (lambda good: good[: len(good) // 10], "is damaged"),
    "a half": (lambda good: good[: len(good) // 2], "is damaged"),
    "nine tenths": (lambda good: good[: -len(good) // 10], "is damaged"),
    "without its last byte": (lambda good: good[:-1], "is damaged"),
    "without its first byte": (lambda good: good[1:], "is damaged"),
    "without a byte inside": (lambda good: good[:3000] + good[3001:], "is damaged"),
    "a flipped byte of the first header": (lambda good: flipped(good, 0.0), "is damaged"),
    "a flipped byte of the pickle": (lambda good: flipped(good, 0.1), "is damaged"),
    "a flipped byte of a tensor": (lambda good: flipped(good, 0.5), "is damaged"),
    "a page of zeros": (lambda good: good[:4096] + bytes(4096) + good[8192:], "is damaged"),
    "zeros": (lambda good: bytes(len(good)), "is no checkpoint: it is a file of another kind"),
    "text": (lambda good: b"trainer: {max_steps: 3}\n", "is no checkpoint: it is a file of another kind"),
    "a plain pickle": (lambda good: pickle.dumps({"state_dict": {}}), "it is a pickle, or has torch's format from"),
    "torch's old format": (old_format, "it is a pickle, or has torch's format from before version 1.6"),
    "a safetensors file": (safetensors, "it is a safetensors file, which holds weights alone"),
    "a plain zip": (lambda good: zipped(readme=b"text"), "a zip archive that torch.save did not write"),
    "an empty zip": (lambda good: zipped(), "is no checkpoint"),
    "a compressed archive": (compressed, "a zip archive that torch.save did not write"),
    "a TorchScript program": (script, "a zip archive that torch.save did not write"),
    "no pickle inside": (lambda good: zipped(a__data=b""), "a zip archive that torch.save did not write"),
    "an empty pickle": (lambda good: with_pickle(good, lambda code: b""), "cannot be read as a checkpoint"),
    "half a pickle": (lambda good: with_pickle(good, lambda code: code[: len(code) // 2]), "cannot be read"),
    "a pickle of noise": (lambda good: with_pickle(good, lambda code: b"\x80\x02" + bytes(range(40, 90))), "--ckpt"),
    "a tensor of a huge size": (
        lambda good: with_pickle(good, lambda code: code.replace(b"K\x02K \x86", b"J\xff\xff\xff\x7fK \x86")),
        "cannot be read as a checkpoint",
    ),
    "code": (lambda good: saved({"state_dict": Runs()}), "may run code: if you trust it, add --weights_only false"),
    "a class": (lambda good: saved({"state_dict": Path("x")}), "holds more than plain data and may run code"),
    "a tensor": (lambda good: saved(torch.zeros(3)), "is not the checkpoint of a run, it holds a tensor"),
    "a list": (lambda good: saved([1, 2]), "is not the checkpoint of a run, it holds a list"),
    "a bare state dict": (lambda good: saved({"a": torch.zeros(1)}), "it has no 'state_dict': it holds parameters"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_checkpoint_is_refused(place, capsys, good, case):
    make, said = FILES[case]
    content = make(good)
    assert content != good
    Path("bad.ckpt").write_bytes(content)
    assert "bad.ckpt" in refuse(capsys, ["fit", *ADAM_LINE, "--ckpt_path", "bad.ckpt"], said)


# Contents, changed in a good checkpoint


def drop(*keys: str) -> Change:
    return lambda content: [content.pop(key) for key in keys]


def put(value: object, *keys: Any) -> Change:
    def change(content: Content) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def rename(old: str, new: str) -> Change:
    return lambda content: content["state_dict"].update({new: content["state_dict"].pop(old)})


def sgd(content: Content) -> None:
    """Replace AdamW's state by SGD's, with momentum, in a checkpoint that does not name the class."""
    layer = torch.nn.Linear(32, 2)
    optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9)
    layer(torch.zeros(1, 32)).sum().backward()
    optimizer.step()
    content["optimizer_states"] = [optimizer.state_dict()]
    del content["config"]


def another_model(content: Content) -> None:
    content["state_dict"] = {"network.token_embedding.weight": torch.zeros(3, 3)}
    content["config"]["model"]["class_path"] = "lightning_modules.separability.Separability"


def another_model_without_config(content: Content) -> None:
    another_model(content)
    del content["config"]


def drop_moment(content: Content) -> None:
    del content["optimizer_states"][0]["state"][0]["exp_avg"]


def drop_decay(content: Content) -> None:
    del content["optimizer_states"][0]["param_groups"][0]["weight_decay"]


NAN, INF = (torch.full((2,), value) for value in (torch.nan, torch.inf))
BIAS, STATE = ("state_dict", "layer.bias"), ("optimizer_states", 0)
PROGRESS = ("loops", "fit_loop", "epoch_progress")
CONTENTS: dict[str, tuple[str, Change, str]] = {
    "no version": ("test", drop("pytorch-lightning_version"), "it has no 'pytorch-lightning_version'"),
    "no sane version": ("fit", put("?", "pytorch-lightning_version"), "a Lightning without a version: '?'"),
    "a number as version": ("fit", put(2, "pytorch-lightning_version"), "a Lightning without a version: 2"),
    "a newer Lightning": ("test", put("99.1", "pytorch-lightning_version"), "was written by Lightning 99.1, and this"),
    "weights only": ("fit", drop("optimizer_states", "lr_schedulers"), "holds weights only, and fit resumes from a"),
    "no schedules": ("fit", drop("lr_schedulers"), "it has no list 'lr_schedulers'"),
    "no loops": ("fit", drop("loops"), "it has no dict 'loops'"),
    "no epoch": ("fit", drop("epoch"), "it has no 'epoch'"),
    "loops as a list": ("test", put([], "loops"), "its 'loops' is no mapping"),
    "no loop of fit": ("fit", put({}, "loops"), "it lacks loops.fit_loop"),
    "no loop of test": ("test", put({"fit_loop": {}}, "loops"), "it lacks loops.test_loop"),
    "progress as text": ("fit", put("7", *PROGRESS), "is damaged: fit_loop.epoch_progress is '7'"),
    "progress without a part": ("fit", put({}, *PROGRESS, "total"), "epoch_progress.total.ready is missing"),
    "negative progress": ("fit", put(-1, *PROGRESS, "total", "ready"), "epoch_progress.total.ready is -1"),
    "callbacks as text": ("test", put("x", "callbacks"), "its 'callbacks' is no mapping"),
    "a negative step": ("fit", put(-3, "global_step"), "its 'global_step' is -3"),
    "half a step": ("fit", put(1.5, "global_step"), "its 'global_step' is 1.5"),
    "a true epoch": ("test", put(True, "epoch"), "its 'epoch' is True"),
    "state as a list": ("fit", put([1], "state_dict"), "there are no named parameters in its 'state_dict'"),
    "state of texts": ("fit", put("x", *BIAS), "layer.bias is a str instead of a tensor in its 'state_dict'"),
    "state of numbers": ("test", put(1.0, *BIAS), "layer.bias is a float instead of a tensor in its 'state_dict'"),
    "a number as name": ("test", put(torch.zeros(1), "state_dict", 5), "the name of a parameter is 5"),
    "a sparse tensor": ("test", put(torch.zeros(2).to_sparse(), *BIAS), "layer.bias is a sparse tensor"),
    "a tensor on meta": ("test", put(torch.zeros(2, device="meta"), *BIAS), "layer.bias is a tensor without values"),
    "no parameters": ("fit", put({}, "state_dict"), "it lacks the model's parameter layer.weight"),
    "a missing parameter": ("fit", lambda content: content["state_dict"].pop("layer.bias"), "parameter layer.bias"),
    "an extra parameter": ("test", put(torch.zeros(1), "state_dict", "more"), "the model does not have: more"),
    "a renamed parameter": ("test", rename("layer.bias", "layer.bais"), "it lacks the model's parameter layer.bias"),
    "another shape": ("test", put(torch.zeros(3), *BIAS), "layer.bias is [3] there and [2] in the model"),
    "a huge shape": ("test", put(torch.zeros(1).expand(2**40), *BIAS), "layer.bias is [1099511627776] there"),
    "whole numbers": ("test", put(torch.zeros(2, dtype=torch.long), *BIAS), "layer.bias is of torch.int64 there"),
    "complex numbers": ("fit", put(torch.zeros(2, dtype=torch.cfloat), *BIAS), "layer.bias is of torch.complex64"),
    "NaN": ("fit", put(NAN, *BIAS), "the weights in bad.ckpt have diverged: layer.bias is not finite"),
    "infinity": ("test", put(INF, *BIAS), "have diverged: layer.bias is not finite"),
    "NaN in half precision": ("test", put(NAN.half(), *BIAS), "have diverged: layer.bias is not finite"),
    "NaN beside an average": ("fit", put({"layer.bias": NAN}, "current_model_state"), "layer.bias is not finite"),
    "an average of another shape": ("fit", put({"x": torch.zeros(1)}, "current_model_state"), "no parameter of this"),
    "another optimizer": ("fit", put("torch.optim.SGD", "config", "model", "init_args", "optimizer"), "state of SGD"),
    "another optimizer without config": ("fit", sgd, "the state of another optimizer than AdamW"),
    "optimizers as text": ("fit", put("x", "optimizer_states"), "it has no list 'optimizer_states'"),
    "an optimizer as text": ("fit", put("x", *STATE), "no state of an optimizer under 'optimizer_states'"),
    "groups as text": ("fit", put("x", *STATE, "param_groups"), "no state of an optimizer"),
    "a group without parameters": ("fit", put([{"lr": 1.0}], *STATE, "param_groups"), "no state of an optimizer"),
    "no optimizer": ("fit", put([], "optimizer_states"), "no state of an optimizer under 'optimizer_states'"),
    "moments as text": ("fit", put("x", *STATE, "state", 0), "no state of an optimizer"),
    "a missing moment": ("fit", drop_moment, "state of AdamW in the checkpoint is damaged: exp_avg of a parameter is"),
    "a moment as text": ("fit", put("x", *STATE, "state", 0, "exp_avg"), "damaged: exp_avg of a parameter is 'x'"),
    "a negative count": ("fit", put(-1, *STATE, "state", 0, "step"), "damaged: step of a parameter is -1"),
    "a rate as text": ("fit", put("x", *STATE, "param_groups", 0, "lr"), "state of AdamW in the checkpoint is damaged"),
    "a rate of NaN": ("fit", put(NAN[0].item(), *STATE, "param_groups", 0, "lr"), "Invalid learning rate: nan"),
    "one beta": ("fit", put([0.9], *STATE, "param_groups", 0, "betas"), "state of AdamW in the checkpoint is damaged"),
    "no decay": ("fit", drop_decay, "state of AdamW in the checkpoint is damaged: weight_decay is missing"),
    "more parameters": ("fit", put([0, 1, 2], *STATE, "param_groups", 0, "params"), "3 parameters, and this run has 2"),
    "another line": ("test", another_model, "it was made with model Separability, and this run has CliModel"),
    "another line without config": ("fit", another_model_without_config, "it has no parameter of this CliModel"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_an_archive_that_is_not_the_checkpoint_of_such_a_run_is_refused(place, capsys, case):
    command, change, said = CONTENTS[case]
    content = torch.load("good/good.ckpt", weights_only=True)
    change(content)
    torch.save(content, "bad.ckpt")
    refuse(capsys, [command, *ADAM_LINE, "--ckpt_path", "bad.ckpt"], said)


def test_a_state_that_its_owner_refuses_ends_in_a_sentence(place, capsys):
    content = torch.load("good/good.ckpt", weights_only=True)
    content["optimizer_states"][0]["param_groups"][0]["params"] = [0]  # as if one parameter had been frozen
    torch.save(content, "bad.ckpt")
    with pytest.raises(SystemExit) as ended:
        main.main(["fit", "--config", "base.yaml", *ADAM_LINE, "--ckpt_path", "bad.ckpt"])
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert "error: --ckpt_path: bad.ckpt cannot be restored: ValueError: loaded state dict contains a" in errors
    assert "Traceback" not in errors


# Paths


def fifo(path: str) -> None:
    os.mkfifo(path)


def open_socket(path: str) -> None:
    socket.socket(socket.AF_UNIX).bind(path)


def sharded(path: str) -> None:
    os.mkdir(path)
    torch.save({}, f"{path}/meta.pt")


def ready(path: str) -> None:
    """Make nothing."""


PATHS: dict[str, tuple[str, Callable[[str], object], str]] = {
    "nothing": ("", ready, "expected the path of a checkpoint, got ''"),
    "blanks": ("  ", ready, "expected the path of a checkpoint, got ' '"),
    "no file": ("bad.ckpt", ready, "there is no file bad.ckpt"),
    "a wrong letter": ("good/goot.ckpt", ready, "there is no file good/goot.ckpt; did you mean good/good.ckpt?"),
    "a file as folder": ("good/good.ckpt/last.ckpt", ready, "there is no file good/good.ckpt/last.ckpt"),
    "last": ("last", ready, "there is no file last: name a file"),
    "a long name": ("x" * 300, ready, "cannot be a file: File name too long"),
    "a null byte": ("bad\0.ckpt", ready, "cannot be a file: embedded null byte"),
    "a folder": ("bad.ckpt", os.mkdir, "bad.ckpt is a folder and not a sharded checkpoint"),
    "a sharded checkpoint": ("bad.ckpt", sharded, "a sharded checkpoint, which trainer.strategy 'auto' cannot read"),
    "a dangling link": ("bad.ckpt", lambda path: os.symlink("gone", path), "is a link to gone, which does not exist"),
    "a loop of links": ("bad.ckpt", lambda path: os.symlink(path, path), "is a link that leads back to itself"),
    "a pipe": ("bad.ckpt", fifo, "bad.ckpt is a pipe, name a checkpoint file"),
    "a socket": ("bad.ckpt", open_socket, "bad.ckpt is a socket, name a checkpoint file"),
    "a device": ("/dev/zero", ready, "/dev/zero is a device, name a checkpoint file"),
    "the terminal": ("/dev/null", ready, "/dev/null is a device, name a checkpoint file"),
    "a config": ("base.yaml", ready, "base.yaml is no checkpoint: it is a file of another kind"),
    "an address of a file": ("file:///nowhere/bad.ckpt", ready, "there is no file /nowhere/bad.ckpt"),
    "a web address": ("https://127.0.0.1:1/bad.ckpt", ready, "is a web address; download the file"),
    "no web address": ("http://", ready, "is a web address; download the file"),
    "no package": ("s3://bucket/bad.ckpt", ready, "s3://bucket/bad.ckpt needs a package that is not installed"),
    "no scheme": ("nope://bad.ckpt", ready, "nope://bad.ckpt is no address of a checkpoint"),
    "nothing at an address": ("memory://bad.ckpt", ready, "cannot be reached: there is nothing at that address"),
}


@pytest.mark.parametrize("case", PATHS)
def test_a_path_without_a_checkpoint_is_refused(place, capsys, case):
    path, make, said = PATHS[case]
    make(path)
    refuse(capsys, ["fit", *ADAM_LINE, f"--ckpt_path={path}"], said)


@pytest.mark.parametrize("blocked", ["stat", "open"])
def test_a_file_without_permission_is_refused(place, capsys, monkeypatch, blocked):
    def forbidden(path, *args, **options):
        if str(path) == "good/good.ckpt":
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **options)

    where = os if blocked == "stat" else builtins
    real = getattr(where, blocked)
    monkeypatch.setattr(where, blocked, forbidden)
    line = ["--ckpt_path", "good/good.ckpt"]
    with pytest.raises(SystemExit) as ended:
        main.main(["fit", "--config", "base.yaml", *line])
    assert ended.value.code == 2
    assert "error: --ckpt_path: no permission to read good/good.ckpt" in capsys.readouterr().err


def test_an_address_that_does_not_answer_is_refused_in_time(place, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "ANSWER_S", 0.1)
    ended = threading.Event()
    monkeypatch.setattr(MemoryFileSystem, "exists", lambda self, path: ended.wait(60))
    refuse(capsys, ["test", "--ckpt_path", "memory://bad.ckpt"], "cannot be reached: no answer within 0.1 s")
    ended.set()


# Checkpoints beside --ckpt_path

ARCHITECTURE = {"vocab_size": 11, "seq_len": 6, "width": 8, "heads": 2, "warmup_steps": 0}
TASK = {"vocab_size": 11, "seq_len": 6, "batch_size": 4, "validation_size": 4, "test_size": 4, "eval_batch_size": 4}
NETWORK = {f"network.{name}": value for name, value in Separability(**ARCHITECTURE).network.state_dict().items()}
ONE = next(iter(NETWORK))
OPTIONS = {
    "start": ("fit", "model.start", ["--model.start=bad.ckpt"]),
    "anchor": ("fit", "model.orthogonality.anchor", ["--model.orthogonality.anchor=bad.ckpt"]),
    "donor": (
        "test",
        "ParameterSwap's donor",
        ["--trainer.callbacks+=ParameterSwap", "--trainer.callbacks.donor=bad.ckpt"],
    ),
}
STATES: dict[str, tuple[object, str]] = {
    "a tensor": (torch.zeros(2), "bad.ckpt is not the checkpoint of a run, it holds a tensor"),
    "a bare state dict": (NETWORK, "it has no 'state_dict': it holds parameters alone"),
    "code": ({"state_dict": Runs()}, "bad.ckpt holds more than plain data and may run code"),
    "NaN": ({"state_dict": NETWORK | {ONE: NETWORK[ONE] * torch.nan}}, "the weights in bad.ckpt have diverged"),
    "another line": ({"state_dict": {"bridge.map.weight": torch.zeros(2)}}, " parameter "),
    "another width": ({"state_dict": {name: value[..., :4] for name, value in NETWORK.items()}}, "does not fit"),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("case", STATES)
def test_another_run_without_weights_of_use_is_refused(place, capsys, option, case):
    (command, name, line), (content, said) = OPTIONS[option], STATES[case]
    model = {"class_path": "Separability", "init_args": ARCHITECTURE}
    data = {"class_path": "InterleavedStreams", "init_args": TASK}
    Path("base.yaml").write_text(yaml.safe_dump({"model": model, "data": data, "trainer": BASE["trainer"]}))
    torch.save(content, "bad.ckpt")
    sentence = refuse(capsys, [command, *line, "--trainer.default_root_dir=mine"], said)
    assert name.removeprefix("ParameterSwap's ") in sentence
