"""A repeated launch on a pretended GPU."""

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from pretended_gpu import pretended_gpu
from torch import Tensor
from triton.runtime.jit import JITFunction

from kernels.call import Call


@triton.jit(do_not_specialize=["N"])
def scale_rows(x, missing, y, N, factor, WIDTH: tl.constexpr, ADD: tl.constexpr):
    i = tl.arange(0, WIDTH)
    tl.store(y + i, tl.load(x + i) * factor + N + ADD)


@pytest.fixture
def launches() -> Iterator[list[list]]:
    """Return what each launch gets: programs, stream and binary, and its arguments, of a tensor only the address."""
    found: list[list] = []

    def launch(x: int, y: int, z: int, stream: int, function: int, *others: object) -> None:
        arguments = others[-len(scale_rows.arg_names) :]
        addresses = [value.data_ptr() if isinstance(value, Tensor) else value or 0 for value in arguments]
        found.append([x, y, z, stream, function, *addresses])

    with pretended_gpu(launch):
        yield found


def test_later_launches_equal_the_first_and_skip_the_search(launches, monkeypatch):
    constants = {"ADD": True, "N": 8, "factor": 0.5, "WIDTH": 512, "OTHER": 1}
    call, x, y = Call(scale_rows, 3, {"num_warps": 2}, constants), torch.zeros(32), torch.zeros(32)
    call(x, None, y)
    monkeypatch.setattr(JITFunction, "run", None)
    call(x, None, y)
    assert launches[1] == launches[0]
    assert launches[0][:4] == [3, 1, 1, 7]
    assert launches[0][5:] == [x.data_ptr(), 0, y.data_ptr(), 8, 0.5, 512, True]
    call(y, None, x)
    assert launches[2][5:8] == [y.data_ptr(), 0, x.data_ptr()]


def test_tensors_that_are_not_aligned_have_a_binary_of_their_own(launches):
    call, x = Call(scale_rows, 1, {}, {"N": 8, "factor": 0.5, "WIDTH": 512, "ADD": False}), torch.zeros(33)
    for start in (1, 0, 0, 1):
        call(x[start:], None, x)
    binaries = [launch[4] for launch in launches]
    assert binaries[0] == binaries[3] != binaries[1] == binaries[2]
    assert [launch[5] - x.data_ptr() for launch in launches] == [4, 0, 0, 4]


def test_nothing_is_launched_for_no_programs(launches):
    Call(scale_rows, 0, {}, {})(torch.zeros(0))
    assert not launches
