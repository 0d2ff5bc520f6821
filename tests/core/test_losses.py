"""The loss without all logits equals the loss with them, and takes less memory."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from datamodules.batch import IGNORE
from lightning_modules.core import losses
from lightning_modules.core.losses import linear_member_losses, member_losses
from lightning_modules.core.metrics import NO_TOKEN

S, B, T, D, V = 2, 3, 5, 4, 7


def inputs(own_labels: bool, share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_SBTD = torch.randn(S, B, T, D, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_SVD = torch.randn(S, V, D, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (S, B, T) if own_labels else (B, T), generator=generator)
    return x_SBTD, weight_SVD, labels.where(torch.rand(labels.shape, generator=generator) < share, IGNORE)


@pytest.mark.parametrize("own_labels", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [losses.CHUNK, 4 * S * V, 1])
@pytest.mark.parametrize("counted", [False, True])
def test_losses_gradients_and_predictions_are_those_of_all_logits(own_labels, share, chunk, counted, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    x_SBTD, weight_SVD, labels = inputs(own_labels, share)
    logits_SBTV = torch.einsum("sbtd,svd->sbtv", x_SBTD, weight_SVD)
    count = int((labels != IGNORE).expand(S, B, T).flatten(1).sum(1).max()) if counted else None
    loss_S, predicted_SBT = linear_member_losses(x_SBTD, weight_SVD, labels, count, double=True)
    expected_S = member_losses(logits_SBTV, labels, double=True)
    torch.testing.assert_close(loss_S, expected_S, rtol=1e-12, atol=0)
    scale_S = torch.tensor([1.0, 3.0])
    gradients = torch.autograd.grad((loss_S * scale_S).sum(), (x_SBTD, weight_SVD))
    expected = torch.autograd.grad((expected_S * scale_S).sum(), (x_SBTD, weight_SVD))
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-14)
    assert torch.equal(predicted_SBT, logits_SBTV.argmax(3).where(labels != IGNORE, IGNORE))


@pytest.mark.parametrize("labelled", [0, 1, 4])
def test_a_loss_is_the_mean_over_labels(labelled):
    x_SBTD, weight_SVD, labels_BT = inputs(False, 1.0)
    labels_BT = labels_BT.where(torch.arange(B * T).view(B, T) < labelled, IGNORE)
    logits_SNV = torch.einsum("sbtd,svd->sbtv", x_SBTD, weight_SVD).flatten(1, 2)[:, :labelled]
    own_SN = logits_SNV.log_softmax(2).gather(2, labels_BT.flatten()[:labelled].expand(S, -1)[..., None])[..., 0]
    expected_S = -own_SN.sum(1) / max(labelled, 1)
    torch.testing.assert_close(linear_member_losses(x_SBTD, weight_SVD, labels_BT, double=True)[0], expected_S)


def test_a_model_that_diverged_predicts_no_token():
    x_SBTD, weight_SVD, labels = inputs(False, 1.0)
    x_SBTD.data[1, 0, 0] = torch.nan
    loss_S, predicted_SBT = linear_member_losses(x_SBTD, weight_SVD, labels)
    assert loss_S.isnan().tolist() == [False, True]
    assert (predicted_SBT == NO_TOKEN).nonzero().tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(("share", "most"), [(1.0, 0.01), (0.02, 0.1)])
def test_it_keeps_no_logits_for_the_backward(share, most, monkeypatch):
    """Kept between forward and backward: the input of the chunks, not their logits; `most` is a share of all logits."""
    monkeypatch.setattr(losses, "CHUNK", 2**12)
    x_SBTD, weight_SVD = torch.randn(1, 2, 256, 4, requires_grad=True), torch.randn(1, 2048, 4, requires_grad=True)
    labels = torch.randint(2048, (2, 256)).where(torch.rand(2, 256) < share, IGNORE)
    kept = 0

    def keep(x: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += x.numel() if x.untyped_storage().data_ptr() != weight_SVD.untyped_storage().data_ptr() else 0
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        linear_member_losses(x_SBTD, weight_SVD, labels, int((labels != IGNORE).sum()))
    assert kept < most * 2 * 256 * 2048
