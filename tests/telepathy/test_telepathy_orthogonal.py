"""Orthogonal matrices: those of torch bit for bit, decomposed on the device of the run."""

import pytest
import torch
from torch import nn

from lightning_modules.pretrained.loading_device import loading_to
from lightning_modules.telepathy import PerceiverBridge
from lightning_modules.telepathy.orthogonal import orthogonal_

SHAPES = [(8, 8), (8, 24), (24, 8), (1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_initialisation_of_torch_bit_for_bit(shape):
    torch.manual_seed(3)
    expected, following = nn.init.orthogonal_(torch.empty(shape)), torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(orthogonal_(torch.empty(shape)), expected)
    assert torch.equal(torch.rand(4), following)
    part = torch.zeros(2 * shape[0], shape[1])
    torch.manual_seed(3)
    orthogonal_(part[shape[0] :])
    assert torch.equal(part, torch.cat([torch.zeros(shape), expected]))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_or_columns_are_orthogonal(shape):
    x = orthogonal_(torch.empty(shape))
    gram = x @ x.T if shape[0] <= shape[1] else x.T @ x
    torch.testing.assert_close(gram, torch.eye(min(shape)))


def test_a_bridge_is_decomposed_on_the_device_of_the_run(telepathy, monkeypatch):
    devices, plain = [], telepathy(PerceiverBridge)
    decompose = torch.linalg.qr

    def watched(x):
        devices.append(x.device.type)
        return decompose(torch.randn(x.shape)) if x.is_meta else decompose(x)

    monkeypatch.setattr(torch.linalg, "qr", watched)
    again = telepathy(PerceiverBridge)
    assert devices == ["cpu", "cpu"]
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), plain.parameters(), strict=True))
    devices.clear()
    torch.manual_seed(0)
    with loading_to(torch.device("meta")):
        orthogonal_(torch.empty(4, 6))
    assert devices == ["meta"]
