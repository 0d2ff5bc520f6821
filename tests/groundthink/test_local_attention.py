"""Attention to a window is the same over all pairs of positions, over blocks, and by its definition."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_modules.mixers.local_attention import attend_blocks, attend_flash, attend_masked, choose

# Positions, positions before the first query, window: no block is full, exactly full, one more; a window over all
SHAPES = [(70, 0, 5), (70, 5, 5), (70, 3, 5), (1, 5, 5), (1, 0, 5), (5, 2, 64), (64, 64, 64), (129, 0, 64), (40, 1, 1)]


def tensors(length: int, past: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = length, length + past, length + past
    return [torch.randn(2, size, 3, 4, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]


def attend_one(q_K: Tensor, k_SK: Tensor, v_SK: Tensor) -> Tensor:
    return ((k_SK @ q_K) / 2).softmax(0) @ v_SK


@pytest.mark.parametrize("attend", [attend_masked, attend_blocks])
@pytest.mark.parametrize(("length", "past", "window"), SHAPES)
def test_values_and_gradients_are_those_of_the_definition(attend, length, past, window):
    q, k, v = tensors(length, past)
    rows = []
    for t in range(length):
        keys = slice(max(0, past + t - window + 1), past + t + 1)
        rows.append(torch.func.vmap(torch.func.vmap(attend_one, (0, 1, 1)))(q[:, t], k[:, keys], v[:, keys]))
    expected = torch.stack(rows, 1)
    output = attend(q, k, v, window)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    seed = torch.randn_like(output)
    gradients, wanted = (torch.autograd.grad(x, (q, k, v), seed) for x in (output, expected))
    torch.testing.assert_close(gradients, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attend", [attend_masked, attend_blocks])
def test_under_vmap(attend):
    q, k, v = (torch.randn(2, 2, 40, 3, 4, dtype=torch.float64) for _ in range(3))
    output = torch.func.vmap(lambda q, k, v: attend(q, k, v, 6))(q, k, v)
    torch.testing.assert_close(output[1], attend(q[1], k[1], v[1], 6))


def test_long_rows_are_read_in_blocks_and_short_ones_at_once():
    q = torch.empty(1, 1, 1, 64)
    assert choose(q, 1024, 64) is attend_blocks
    assert choose(q, 256, 64) is attend_masked
    assert choose(q, 64, 4) is attend_masked  # blocks have at least 16 queries
    assert choose(q, 65, 64) is attend_masked  # one step of generation


def test_flash_attention_returns_rows_like_the_queries():
    with FakeTensorMode():
        q, k = (torch.empty(2, size, 3, 64, device="cuda", dtype=torch.bfloat16) for size in (70, 75))
        assert attend_flash(q, k, k, 5).shape == q.shape


@pytest.mark.parametrize(
    ("device", "dtype", "width", "capability", "flash"),
    [
        ("cuda", torch.bfloat16, 64, (9, 0), True),
        ("cuda", torch.float16, 256, (8, 0), True),
        ("cuda", torch.bfloat16, 64, (7, 5), False),
        ("cuda", torch.float32, 64, (9, 0), False),
        ("cuda", torch.bfloat16, 20, (9, 0), False),
        ("cuda", torch.bfloat16, 264, (9, 0), False),
        ("cpu", torch.bfloat16, 64, (9, 0), False),
    ],
)
def test_flash_attention_runs_where_it_can(monkeypatch, device, dtype, width, capability, flash):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        q = torch.empty(2, 600, 3, width, device=device, dtype=dtype)
        assert (choose(q, 605, 5) is attend_flash) == flash
