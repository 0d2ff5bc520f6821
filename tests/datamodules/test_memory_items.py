"""MemoryItems: each row is a function of the seed and of its number, whatever the batch it comes in."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules import MemoryItems

SIZES = {"items": 6, "key_width": 8, "value_width": 4, "context": 4, "seed": 2}


def drawn(rows, seed=2, members=1):
    data = MemoryItems(**SIZES | {"seed": seed})
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(ensemble=members))
    return data.draw(np.array(rows))


def test_a_row_depends_on_its_number_and_not_on_its_batch():
    many, alone = drawn([0, 1, 2]), drawn([2])
    for name, x in many.items():
        assert torch.equal(x[:, 2:], alone[name])
        assert len({tuple(row.flatten().tolist()) for row in x[0]}) == 3
    assert not torch.equal(many["context_SBNWK"], many["noise_SBNWK"])


def test_a_member_has_the_rows_of_its_seed():
    together = drawn([0, 1], members=3)
    for member in range(3):
        for name, x in drawn([0, 1], seed=2 + member).items():
            assert torch.equal(together[name][member], x[0])


def test_kernels_are_uniform_up_to_the_root_of_the_context():
    kernel = drawn(range(200))["kernel_SBWK"]
    assert kernel.abs().max().item() == pytest.approx(4**-0.5, rel=0.01)
    assert kernel.mean().item() == pytest.approx(0, abs=0.02)
