"""Routing stability is 1 - divergence of attention, and the monitor does not change the training."""

import math

import pytest
import torch
from conftest import QUIET
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from callbacks.routing_monitor import RoutingMonitor, js_divergence, routing_stability


def distribution(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("p", "q", "bits"),
    [
        ((0.25, 0.75, 0.0), (0.25, 0.75, 0.0), 0.0),
        ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), 1.0),
        ((0.5, 0.5, 0.0, 0.0), (0.0, 0.0, 0.25, 0.75), 1.0),
        # m = (3/4, 1/4): (log2(4/3) + (1/2) log2(2/3) + (1/2) log2(2)) / 2
        ((1.0, 0.0), (0.5, 0.5), (math.log2(4 / 3) + math.log2(2 / 3) / 2 + 0.5) / 2),
        # m = (1/2, 1/2): both terms are 1 bit minus the entropy of (1/4, 3/4)
        ((0.25, 0.75), (0.75, 0.25), 1 - (0.5 + 0.75 * math.log2(4 / 3))),
    ],
)
def test_divergence_in_closed_form(p, q, bits):
    expected = torch.tensor(bits, dtype=torch.float64)
    for first, second in ((p, q), (q, p)):
        divergence = js_divergence(distribution(*first), distribution(*second))
        torch.testing.assert_close(divergence, expected, rtol=0, atol=1e-12)


def test_divergence_of_half_precision_is_computed_in_fp32():
    p, q = torch.randn(5, 7).softmax(-1).bfloat16(), torch.randn(5, 7).softmax(-1).bfloat16()
    assert js_divergence(p, q).dtype == torch.float32
    torch.testing.assert_close(js_divergence(p, q), js_divergence(p.double(), q.double()).float())


def test_stability_is_a_mean_over_queries_from_the_second_on():
    same, moved = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0]]), torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    before_SBHTT = same.expand(2, 1, 2, 3, 3).clone()
    now_SBHTT = before_SBHTT.clone()
    now_SBHTT[1, 0, 0] = moved  # one of two queries, in one of two heads, of the second member
    torch.testing.assert_close(routing_stability(now_SBHTT, before_SBHTT), torch.tensor([1.0, 0.75]))
    assert routing_stability(torch.ones(1, 2, 2, 1, 1), torch.ones(1, 2, 2, 1, 1)).tolist() == [1.0]


class Sequences(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return {"tokens": torch.randint(5, (4,), generator=torch.Generator().manual_seed(i))}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.pattern = nn.Identity()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()


class Shifting(LightningModule):
    """Each query of member s reads from position 0 before step `turns[s]`, and then from position 1."""

    def __init__(self, turns=(3,)):
        super().__init__()
        torch.manual_seed(0)
        self.turns = turns
        self.ensemble = len(turns)
        self.members = {}
        self.block = Block()
        self.weight = nn.Parameter(torch.randn(3))
        self.probes, self.trace = [], {}

    def activations(self, tokens, sites):
        assert sites == ["*.attn.pattern"]
        assert not torch.is_grad_enabled()
        assert not self.training
        self.probes.append(tokens)
        torch.rand(1)  # the monitor must restore the random state
        length = tokens.shape[1]
        pattern = torch.zeros(self.ensemble, len(tokens), 2, length, length)
        pattern[..., 0, 0] = 1
        for member, turn in enumerate(self.turns):
            pattern[member, :, :, 1:, int(self.global_step >= turn)] = 1
        return tokens, {"block.attn.pattern": pattern, "other.attn.pattern": pattern[:, :, :1]}

    def training_step(self, batch, batch_idx):
        assert self.training
        return (self.weight * torch.rand(3)).sum()

    def on_train_batch_end(self, *_):
        if "routing/g" in self.members:
            self.trace[self.global_step] = self.members.pop("routing/g").tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Blind(Shifting):
    activations = None


def fit(module, tmp_path, monitor, steps, ckpt_path=None, batch_size=16, **flags):
    callbacks = [monitor] if monitor else []
    flags = QUIET | {"accelerator": "cpu", "max_steps": steps, "limit_val_batches": 0} | flags
    trainer = Trainer(default_root_dir=tmp_path, callbacks=callbacks, **flags)
    held_out = DataLoader(Sequences(), batch_size=batch_size)
    # Four batches per epoch, so that runs cross epochs
    loader = DataLoader(Sequences(), batch_size=16, shuffle=True)
    module.val_dataloader = lambda: held_out
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_each_member_has_its_value_from_the_second_check_on(tmp_path):
    module = Shifting(turns=(3, 99, 6))
    trainer = fit(module, tmp_path, RoutingMonitor(every_n_steps=2, n_samples=3), 9)
    # The checks before and after a turn differ in every query.
    assert module.trace == {2: [1, 1, 1], 4: [0, 1, 1], 6: [1, 1, 0], 8: [1, 1, 1]}
    assert trainer.callback_metrics["routing/g"] == 1
    expected = torch.stack([Sequences()[i]["tokens"] for i in range(3)])
    assert len(module.probes) == 5
    assert all(torch.equal(probe, expected) for probe in module.probes)


def test_the_training_is_the_same_with_the_monitor(tmp_path):
    plain, monitored = Shifting(), Shifting()
    torch.manual_seed(1)
    fit(plain, tmp_path, None, 6)
    torch.manual_seed(1)
    fit(monitored, tmp_path, RoutingMonitor(every_n_steps=1), 6)
    assert torch.equal(plain.weight, monitored.weight)


@pytest.mark.parametrize(("stop", "steps"), [(4, [6, 8]), (5, [8])])
def test_resumed_run_loses_at_most_the_first_check(stop, steps, tmp_path):
    whole, part, rest = (Shifting(turns=(6,)) for _ in range(3))
    fit(whole, tmp_path, RoutingMonitor(every_n_steps=2), 8)
    fit(part, tmp_path, RoutingMonitor(every_n_steps=2), stop).save_checkpoint(tmp_path / "part.ckpt")
    fit(rest, tmp_path, RoutingMonitor(every_n_steps=2), 8, ckpt_path=tmp_path / "part.ckpt")
    assert rest.trace == {step: whole.trace[step] for step in steps}


def test_held_out_data_of_the_trainer(tmp_path):
    module = Shifting()
    trainer = Trainer(
        accelerator="cpu", max_steps=2, default_root_dir=tmp_path, callbacks=[RoutingMonitor(every_n_steps=1)], **QUIET
    )
    module.validation_step = lambda batch, batch_idx: None
    trainer.fit(module, DataLoader(Sequences(), batch_size=16), DataLoader(Sequences(), batch_size=5))
    assert module.probes[0].shape == (5, 4)


def test_members_with_different_data_are_probed_on_their_data(tmp_path):
    module, shapes = Shifting(turns=(1, 2)), []
    batch = {"tokens": torch.zeros(2, 8, 4, dtype=torch.long)}
    module.val_dataloader = lambda: DataLoader([batch], batch_size=None)
    module.activations = lambda tokens, sites: shapes.append(tokens.shape) or (tokens, {"a": torch.ones(2, 3, 1, 4, 4)})
    trainer = Trainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path, callbacks=[RoutingMonitor(n_samples=3)], **QUIET
    )
    trainer.fit(module, DataLoader(Sequences()))
    assert shapes == [(2, 3, 4)]


def test_user_errors(tmp_path):
    with pytest.raises(ValueError, match="`n_samples` must be at least 1, got 0"):
        fit(Shifting(), tmp_path, RoutingMonitor(n_samples=0), 1)
    with pytest.raises(ValueError, match=r"RoutingMonitor\.site: no module matches 'pattrn'; .*: 'block"):
        fit(Shifting(), tmp_path, RoutingMonitor("pattrn"), 1)
    with pytest.raises(ValueError, match="Two RoutingMonitor callbacks would log under one name"):
        Trainer(accelerator="cpu", max_steps=1, callbacks=[RoutingMonitor(), RoutingMonitor()], **QUIET).fit(
            Shifting(), DataLoader(Sequences())
        )
    with pytest.raises(ValueError, match=r"needs `activations\(tokens, sites\)`, which Blind does not have"):
        fit(Blind(), tmp_path, RoutingMonitor(), 1)
    vectors = Shifting()
    vectors.activations = lambda tokens, sites: (tokens, {"block.attn": torch.zeros(1, 2, 3, 4)})
    with pytest.raises(ValueError, match=r"'block.attn' gives no attention weights .* but \(1, 2, 3, 4\)"):
        fit(vectors, tmp_path, RoutingMonitor(), 1)
    monitor = RoutingMonitor()
    trainer = Trainer(accelerator="cpu", max_steps=1, default_root_dir=tmp_path, callbacks=[monitor], **QUIET)
    with pytest.raises(ValueError, match="found no held-out data"):
        trainer.fit(Shifting(), DataLoader(Sequences()))
