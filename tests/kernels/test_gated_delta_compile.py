"""What the first call with new types compiles, on a pretended GPU and with a pretended compiler."""

from collections.abc import Iterator
from unittest.mock import MagicMock

import pytest
import torch
import triton.compiler
from pretended_gpu import pretended_gpu
from toy_gated_delta import Toy

from kernels.gated_delta import launch
from kernels.gated_delta.function import gated_delta

KERNELS = launch.prepare_chunks, launch.compute_outputs, launch.sweep_both_ways, launch.compute_gradients


@pytest.fixture
def compiled(monkeypatch) -> Iterator[list[str]]:
    """Return the names of the kernels that are compiled, in order."""
    names: list[str] = []

    def compile(source, **options: object) -> object:
        names.append(source.name)
        binary = MagicMock()
        binary.result.return_value = binary
        return binary

    def forget() -> None:
        for cache in launch.compile_step, launch.plan_forward, launch.plan_backward:
            cache.cache_clear()
        for kernel in KERNELS:
            kernel.device_caches.clear()

    monkeypatch.setattr(triton.compiler, "compile", compile)
    forget()
    with pretended_gpu(lambda *_: None):
        yield names
    forget()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bounds", [None, (0, 7, 20)])
@pytest.mark.parametrize("groups", [1, 2])
def test_all_kernels_of_a_step_are_compiled_before_the_first_one_runs(compiled, dtype, bounds, groups):
    toy = Toy(B=1, T=20, H=2, J=2 * groups, K=16, V=16, bounds=bounds, dtype=dtype)
    inputs = [x.requires_grad_() for x in toy.inputs()]
    o, *_ = gated_delta(*inputs, toy.cu_seqlens, 0.3, True, True, False)
    assert sorted(compiled) == sorted(kernel.__name__ for kernel in KERNELS)
    o.sum().backward()
    assert len(compiled) == len(KERNELS)


def test_without_gradients_only_the_forward_is_compiled(compiled):
    *rows, _ = Toy(B=1, T=20, K=16, V=16, dtype=torch.float32).inputs()
    gated_delta(*rows, None, None, 0.3, True, True, False)
    assert compiled == ["prepare_chunks", "compute_outputs"]
