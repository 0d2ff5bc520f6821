"""Which checkpoints of a config are read before anything is built, and what is asked of each."""

import time
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch

from cli.checkpoint import RESUMED, SHARDED, SHARDING, check_files
from datamodules.errors import UserError

VERSION = "pytorch-lightning_version"
CONTENT = {VERSION: lightning.__version__, "optimizer_states": [], "lr_schedulers": [], "loops": {}}
CONTENT |= {"callbacks": {}, "epoch": 0, "global_step": 0, "state_dict": {"w": torch.ones(2, 3)}}
NAN = {"state_dict": {"w": torch.tensor([[torch.nan] * 3, [1.0] * 3])}}  # of the first of two members


def config(ckpt_path=None, callbacks=None, strategy="auto", **arguments):
    model = {"class_path": "lines.Model", "init_args": arguments}
    return {"ckpt_path": ckpt_path, "model": model, "trainer": {"callbacks": callbacks, "strategy": strategy}}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(CONTENT, "whole.ckpt")
    torch.save(CONTENT | NAN, "nan.ckpt")


def save(*without, **keys):
    torch.save({key: value for key, value in (CONTENT | keys).items() if key not in without}, "a.ckpt")
    return config("a.ckpt")


def swap(kind="callbacks.ParameterSwap", **options):
    return {"class_path": kind, "init_args": {"donor": "gone.ckpt"} | options}


READ = {
    "ckpt_path": config("gone.ckpt"),
    "start": config(start="gone.ckpt"),
    "anchor": config("whole.ckpt", orthogonality={"class_path": "a.Penalty", "init_args": {"anchor": "gone.ckpt"}}),
    "donor": config(callbacks=swap()),
    "donor in a list": config("whole.ckpt", callbacks=[{"class_path": "a.Other"}, swap("ParameterSwap", mode="rows")]),
    "NaN": config("nan.ckpt"),
    "NaN in a start": config(start="nan.ckpt"),
    "NaN in an anchor": config(
        on_nonfinite="continue", orthogonality={"class_path": "a.Penalty", "init_args": {"anchor": "nan.ckpt"}}
    ),
}


@pytest.mark.parametrize("case", READ)
def test_a_file_that_the_command_reads_must_be_there_and_finite(case):
    with pytest.raises(UserError, match=r"there is no file gone.ckpt|weights in nan.ckpt have diverged"):
        check_files("fit", READ[case])


NOT_READ = {
    "nothing": config(),
    "whole": config("whole.ckpt"),
    "start behind --ckpt_path": config("whole.ckpt", start="gone.ckpt"),
    "random donor": config(callbacks=[swap(mode="random")]),
    "another callback": config(callbacks=swap("a.Other")),
    "NaN that may go on": config("nan.ckpt", on_nonfinite="continue"),
    "NaN in a start that may go on": config(start="nan.ckpt", on_nonfinite="continue"),
    "NaN in one of two members": config("nan.ckpt", ensemble=2),
}


@pytest.mark.parametrize("case", NOT_READ)
def test_other_files_are_not_asked_for(case):
    check_files("fit", NOT_READ[case])


def test_weights_alone_are_for_evaluations(tmp_path):
    alone = save("optimizer_states", "lr_schedulers", "loops", "callbacks", "epoch", "global_step")
    for command in ("validate", "test", "predict"):
        check_files(command, alone)
    with pytest.raises(UserError, match=r"resumes from a whole checkpoint$"):
        check_files("fit", alone)
    with pytest.raises(UserError, match=r"; to start from these weights, set model.start$"):
        check_files("fit", config("a.ckpt", start=None))


@pytest.mark.parametrize("key", [*RESUMED, "global_step", "epoch"])
def test_a_fit_needs_every_part_of_a_whole_checkpoint(key):
    with pytest.raises(UserError, match="holds weights only" if key == "optimizer_states" else f"it has no .*'{key}'"):
        check_files("fit", save(key))


@pytest.mark.parametrize("key", ["global_step", "epoch"])
@pytest.mark.parametrize("count", [-1, 1.0, False, "1"])
def test_a_count_is_a_number_of_steps(key, count):
    with pytest.raises(UserError, match=f"its '{key}' is {count!r}"):
        check_files("test", save(**{key: count}))


def test_a_newer_minor_version_is_refused_and_a_newer_patch_is_not():
    major, minor, *_ = map(int, lightning.__version__.split(".")[:2])
    for version in (f"{major}.{minor}.99", f"{major - 1}.99.0"):
        check_files("fit", save(**{VERSION: version}))
    with pytest.raises(UserError, match="install that version"):
        check_files("fit", save(**{VERSION: f"{major}.{minor + 1}.0"}))


@pytest.mark.parametrize("part", SHARDED)
@pytest.mark.parametrize("strategy", [*SHARDING, "fsdp_cpu_offload", {"class_path": "a.FSDPStrategy"}])
def test_a_sharded_checkpoint_is_left_to_its_strategy(part, strategy):
    Path("shards").mkdir()
    Path("shards", part).touch()
    check_files("fit", config("shards", strategy=strategy))
    with pytest.raises(UserError, match=r"is a sharded checkpoint, which trainer.strategy 'ddp' cannot read"):
        check_files("fit", config("shards", strategy="ddp"))


def test_a_file_that_may_run_code_is_read_where_the_user_trusts_it():
    trusted = save(note=Path("x")) | {"weights_only": False}
    check_files("fit", trusted)
    for doubted in (trusted | {"weights_only": None}, save(note=Path("x"))):
        with pytest.raises(UserError, match="may run code"):
            check_files("fit", doubted)


def test_an_address_of_a_file_is_that_file():
    check_files("fit", config(f"file://{Path('whole.ckpt').resolve()}"))
    with pytest.raises(UserError, match="have diverged"):
        check_files("fit", config(f"file://{Path('nan.ckpt').resolve()}"))


@pytest.mark.parametrize("key", ["callbacks", "loops"])
def test_the_parts_of_a_run_are_mappings(key):
    with pytest.raises(UserError, match=f"a.ckpt is not the checkpoint of a run, its '{key}' is no mapping"):
        check_files("test", save(**{key: [1]}))


ADDRESSES = {
    "there": (lambda address: True, None),
    "gone": (lambda address: False, "there is nothing at that address"),
    "refused": (lambda address: {}[address], "KeyError: 's3://a/b.ckpt'"),
    "slow": (lambda address: time.sleep(0.3), "no answer within 0.1 s"),
}


@pytest.mark.parametrize("case", ADDRESSES)
def test_a_remote_file_is_there_and_is_not_read(monkeypatch, case):
    exists, fault = ADDRESSES[case]
    monkeypatch.setattr("cli.checkpoint.get_filesystem", lambda address: SimpleNamespace(exists=exists))
    monkeypatch.setattr("cli.checkpoint.ANSWER_S", 0.1)
    if fault is None:
        check_files("fit", config("s3://a/b.ckpt"))
        return
    with pytest.raises(UserError, match=f"^--ckpt_path: s3://a/b.ckpt cannot be reached: {fault}$"):
        check_files("fit", config("s3://a/b.ckpt"))


def test_a_web_address_is_refused():
    for scheme in ("http", "https"):
        with pytest.raises(UserError, match="is a web address; download the file"):
            check_files("test", config(f"{scheme}://a/b.ckpt"))
