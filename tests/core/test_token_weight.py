"""Ranks with unequal numbers of labels: the mean over ranks is the mean over the labels of all."""

from types import SimpleNamespace

import torch

from datamodules.batch import IGNORE
from lightning_modules.core.token_weight import weigh_labels
from lightning_modules.question_answering import module as question_answering
from lightning_modules.separability import Separability


def rank(counts: torch.Tensor) -> SimpleNamespace:
    """A module of two ranks, which have these numbers of labels."""
    trainer = SimpleNamespace(world_size=2)
    return SimpleNamespace(_trainer=trainer, device=torch.device("cpu"), all_gather=lambda _: counts)


def test_a_mean_over_ranks_is_one_over_labels():
    labels = [torch.tensor([[1, 2, 3]]), torch.tensor([[1, IGNORE, IGNORE]])]
    means = [torch.tensor(2.0), torch.tensor(6.0)]
    module = rank(torch.tensor([3.0, 1.0]))
    weighted = [weigh_labels(module, mean, own) for mean, own in zip(means, labels, strict=True)]
    assert sum(weighted) / 2 == (3 * 2.0 + 6.0) / 4
    members = rank(torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    both = weigh_labels(members, torch.ones(2), torch.stack([labels[0], labels[1]]))
    assert both.tolist() == [1.5, 1.0]
    alone = SimpleNamespace(_trainer=None)
    assert weigh_labels(alone, means[0], labels[0]) is means[0]


def test_steps_weigh_their_loss(monkeypatch):
    assert question_answering.weigh_labels is weigh_labels
    model = Separability(vocab_size=8, seq_len=3, width=8, heads=2, warmup_steps=0)
    batch = {"tokens": torch.ones(1, 3, dtype=torch.long), "labels": torch.tensor([[1, 2, IGNORE]])}
    loss = model.training_step(batch, 0)
    monkeypatch.setattr("lightning_modules.core.sequence_model.weigh_labels", lambda module, mean, labels: mean * 3)
    assert torch.equal(model.training_step(batch, 0), loss * 3)
