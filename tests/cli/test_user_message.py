"""Which exceptions end in a sentence, and which keep their stack trace."""

from pickle import UnpicklingError

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from cli.user_errors import host_message, user_message
from datamodules.errors import UserError


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_a_users_mistake_is_its_sentence():
    assert user_message(UserError("data.x: no\n  file")) == "data.x: no file"
    assert user_message(MisconfigurationException("no such flag")) == "no such flag"
    assert user_message(caused(ValueError("Does not validate"), caused(ValueError("Union"), UserError("a")))) == "a"
    mismatch = RuntimeError('Missing key(s) in state_dict: "layer.weight"')
    assert "layer.weight" in user_message(mismatch)
    assert "--weights_only false" in user_message(UnpicklingError("Weights only load failed. This file ..."))


@pytest.mark.parametrize("error", [ValueError("x"), OSError("x"), RuntimeError("x"), UnpicklingError("x"), KeyError(1)])
def test_a_bug_has_no_sentence(error):
    assert user_message(error) is None
    assert host_message(error) is None


class Refusing:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise UserError("data.path: it is empty")


def test_a_mistake_found_by_a_data_loaders_worker():
    with pytest.raises(UserError) as caught:
        next(iter(DataLoader(Refusing(), num_workers=1)))
    assert user_message(caught.value) == "data.path: it is empty"


MEMORY = {
    "GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"), "20.00 GiB"),
    "CUDA": (RuntimeError("CUDA error: out of memory"), "out of memory:"),
    "CPU": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes"),
        "4.00 GiB",
    ),
    "Python": (MemoryError(), "out of memory:"),
    "numpy": (MemoryError("Unable to allocate 2.00 TiB for an array with shape (1,)"), "was of 2.00 TiB)"),
    "wrapped": (caused(ValueError("x"), torch.OutOfMemoryError("CUDA out of memory.")), "out of memory:"),
}


@pytest.mark.parametrize("case", MEMORY)
def test_exhausted_memory_says_what_to_lower(case):
    error, said = MEMORY[case]
    sentence = host_message(error)
    assert said in sentence
    assert "data.batch_size" in sentence
    assert "bf16-mixed" in sentence
    assert user_message(error) is None


def raised_in(module: str) -> MemoryError:
    """Return an error that code of a module of that name has raised."""
    try:
        exec("raise MemoryError", {"__name__": module})
    except MemoryError as error:
        return error
    raise AssertionError


def test_exhausted_memory_names_the_place_and_what_to_lower_there():
    assert host_message(raised_in("callbacks.recall_grid")) == (
        "out of memory in callbacks.recall_grid: lower the sizes of the callback, or data.eval_batch_size"
    )
    assert host_message(raised_in("datamodules.text_source")) == (
        "out of memory in datamodules.text_source: lower data.batch_size or the other sizes of the data"
    )
    assert "in lightning_modules.core.block: lower data.batch_size" in host_message(
        raised_in("lightning_modules.core.block")
    )
    assert host_message(raised_in("numpy")).startswith("out of memory: lower data.batch_size")
