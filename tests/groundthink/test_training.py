"""The loss without all logits, and the penalties: their values, when they begin, and that a resumed run knows it."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks.activation_clamp import ActivationClamp
from datamodules.associative_recall import AssociativeRecall
from datamodules.batch import IGNORE
from datamodules.errors import UserError
from datamodules.needle_gym import NeedleGym
from lightning_modules.core import losses
from lightning_modules.core.graphs import GraphedStep
from lightning_modules.groundthink import GroundThink, training
from lightning_modules.groundthink.penalties import KeyPenalty, Onsets, Penalty
from lightning_modules.mixers.key_bank import KeyBank
from lightning_modules.mixers.writes import key_overlap

SIZES = {"vocab_size": 16, "seq_len": 16, "width": 16, "window": 4, "seed": 0, "warmup_steps": 1}
BOTH = {"key_orthogonality": KeyPenalty(0.5), "beta_sparsity": Penalty(2.0)}


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(16, (4, 16), generator=generator)
    return {"tokens": tokens_BT, "labels": tokens_BT.where(torch.rand(4, 16, generator=generator) < 0.3, IGNORE)}


def fit(module: GroundThink, folder, *callbacks: Callback, steps: int = 4, resume: str | None = None) -> Trainer:
    data = NeedleGym(needles=2, seq_len=16, vocab_size=16, batch_size=4, validation_size=8, test_size=8)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=steps,
        default_root_dir=folder, callbacks=list(callbacks), val_check_interval=1, check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)
    return trainer


class Weights(Callback):
    """Notes the weights of the penalties at each step, and sets the held-out accuracies."""

    def __init__(self, accuracies: list[list[float]] | None = None):
        self.accuracies, self.weights, self.logged = accuracies, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        values = {name: torch.ones(pl_module.ensemble) for name in pl_module.onsets.penalties}
        step = trainer.global_step - 1  # of this batch
        weighed = pl_module.onsets.weigh(values, step)
        self.weights.append({name: weight_S.tolist() for name, (weight_S, _) in weighed.items()})
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        if self.accuracies:  # of the validation that follows
            accuracy_S, advance = torch.tensor(self.accuracies[step]), type(pl_module.onsets).advance
            pl_module.onsets.advance = lambda _: advance(pl_module.onsets, accuracy_S)


def test_overlap_is_the_mean_over_pairs():
    k_BTHK = torch.randn(2, 9, 3, 4, dtype=torch.float64)
    cosine_BHTT = torch.einsum("bthk,bshk->bhts", *[normalize(k_BTHK, dim=-1)] * 2)
    pairs = ~torch.eye(9, dtype=torch.bool)
    torch.testing.assert_close(key_overlap(k_BTHK, "squared"), cosine_BHTT[..., pairs].square().mean())
    torch.testing.assert_close(key_overlap(k_BTHK, "absolute"), cosine_BHTT[..., pairs].abs().mean())
    orthogonal_BTHK = (3 * torch.eye(4))[None, :, None]
    for form in ("squared", "absolute"):
        assert key_overlap(orthogonal_BTHK, form).abs() < 1e-6
        torch.testing.assert_close(key_overlap(torch.ones(1, 5, 1, 4), form), torch.tensor(1.0))
        assert key_overlap(torch.randn(2, 1, 3, 4), form).abs() < 1e-5  # one position has no pair
    assert key_overlap(torch.randn(4, 200, 2, 64), "squared") == pytest.approx(1 / 64, rel=0.1)
    random = key_overlap(torch.randn(4, 200, 2, 64), "absolute")
    assert random == pytest.approx(math.sqrt(2 / math.pi / 64), rel=0.1)  # the notes' 0.10


@pytest.mark.parametrize("options", [{}, {"shifted_value": True, "keys": "both"}])
@pytest.mark.parametrize("ensemble", [1, 2])
def test_a_step_adds_the_weighted_values_of_all_mixers(ensemble, options):
    module = GroundThink(**SIZES, pattern="GSG", ensemble=ensemble, **BOTH, **options).double()
    plain = GroundThink(**SIZES, pattern="GSG", ensemble=ensemble, **options).double()
    _, seen = module.activations(batch()["tokens"], ["*.key", "*.beta"])
    overlaps = [[key_overlap(x, "squared") for x in x_SBTHK] for name, x_SBTHK in seen.items() if "key" in name]
    betas = [[x.mean() for x in x_SBTH] for name, x_SBTH in seen.items() if "beta" in name]
    overlap, beta = (torch.stack([torch.stack(x) for x in values]).mean(0).detach() for values in (overlaps, betas))
    loss = module.training_step(batch(), 0)
    expected = plain.training_step(batch(), 0) + (0.5 * overlap + 2 * beta).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    outputs = module.losses(batch()["tokens"], batch()["labels"])[1]
    torch.testing.assert_close(torch.stack(outputs[1:]), torch.stack([overlap, beta]), rtol=1e-6, atol=0)


def test_penalties_reach_what_they_name():
    """Gradient descent on each penalty alone lowers its value."""
    for index, name in enumerate(BOTH, start=1):
        module = GroundThink(**SIZES, pattern="GS", **BOTH)
        values = []
        for _ in range(20):
            value = module.losses(**batch())[1][index].sum()
            module.zero_grad()
            value.backward()
            with torch.no_grad():
                for weight in module.parameters():
                    weight.sub_(0 if weight.grad is None else 0.5 * weight.grad)
            values.append(value.item())
        assert values[-1] < 0.9 * values[0], name


def test_penalties_begin_at_a_step_and_are_logged_from_the_start(tmp_path):
    notes = Weights()
    options = {"key_orthogonality": KeyPenalty(0.5, from_step=2), "beta_sparsity": Penalty(0.0)}
    fit(GroundThink(**SIZES, **options), tmp_path, notes)
    assert [weights["key_orthogonality"] for weights in notes.weights] == [[0.0], [0.0], [0.5], [0.5]]
    assert [weights["beta_sparsity"] for weights in notes.weights] == [[0.0]] * 4
    assert all(0 < values["train/key_orthogonality"] < 1 for values in notes.logged)
    assert all(0 < values["train/beta_sparsity"] < 1 for values in notes.logged)


def test_a_penalty_waits_for_the_accuracy_of_each_member_and_does_not_end_again(tmp_path):
    notes = Weights([[0.1, 0.6], [0.4, 0.2], [0.5, 0.9], [0.0, math.nan]])
    options = {"key_orthogonality": KeyPenalty(1.0, from_accuracy=0.5), "beta_sparsity": Penalty(1.0, 2, 0.6)}
    module = GroundThink(**SIZES, **options, ensemble=2)
    fit(module, tmp_path, notes)
    assert [weights["key_orthogonality"] for weights in notes.weights] == [[0, 0], [0, 1], [0, 1], [1, 1]]
    assert [weights["beta_sparsity"] for weights in notes.weights] == [[0, 0], [0, 0], [0, 1], [0, 1]]
    assert module.onsets.begun() == {"key_orthogonality": [True, True], "beta_sparsity": [False, True]}


def test_a_penalty_that_waits_for_an_accuracy_needs_validations(tmp_path):
    module = GroundThink(**SIZES, beta_sparsity=Penalty(1.0, from_accuracy=0.5))
    trainer = Trainer(accelerator="cpu", logger=False, max_steps=1, default_root_dir=tmp_path, limit_val_batches=0)
    with pytest.raises(UserError, match=r"model\.beta_sparsity\.from_accuracy: trainer\.limit_val_batches is 0"):
        trainer.fit(module, NeedleGym(needles=2, seq_len=16, vocab_size=16, batch_size=4))


def test_a_penalty_that_never_begins_is_told(tmp_path):
    module = GroundThink(**SIZES, beta_sparsity=Penalty(1.0, from_step=2))
    with pytest.warns(UserWarning, match=r"model\.beta_sparsity\.from_step is 2, so the penalty never begins"):
        fit(module, tmp_path, Weights(), steps=2)


def test_validation_before_training_begins_nothing(tmp_path):
    module, notes = GroundThink(**SIZES, beta_sparsity=Penalty(1.0, from_accuracy=0.0)), Weights()
    fit(module, tmp_path, notes, steps=2)  # whose first validation is the sanity check
    assert [weights["beta_sparsity"] for weights in notes.weights] == [[0.0], [1.0]]


def test_a_resumed_run_has_the_weights_of_the_uninterrupted_one(tmp_path):
    def make() -> GroundThink:
        return GroundThink(**SIZES, schedule="constant", key_orthogonality=KeyPenalty(1.0, from_accuracy=0.5))

    whole, rest = make(), make()
    keeper = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    fit(whole, tmp_path, Weights([[0.6], [0.1], [0.1], [0.1]]), keeper)
    assert rest.onsets.begun() == {"key_orthogonality": [False]}
    fit(rest, tmp_path, Weights([[0.1]] * 4), resume=str(tmp_path / "step=2.ckpt"))
    assert rest.onsets.begun() == {"key_orthogonality": [True]}
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name
    other = Onsets({"beta_sparsity": Penalty(1.0, from_accuracy=0.5)}, 1)
    other.restore(whole.onsets.begun())
    assert other.begun() == {"beta_sparsity": [False]}


@pytest.mark.parametrize("ensemble", [1, 2])
def test_a_run_without_all_logits_is_the_run_with_them(ensemble, tmp_path):
    """A hook on the unembedding makes all logits."""
    options = SIZES | BOTH | {"ensemble": ensemble}
    fused, hooked = GroundThink(**options), GroundThink(**options)
    fit(fused, tmp_path)
    fit(hooked, tmp_path, ActivationClamp("unembed", "identity"))
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(value, hooked.state_dict()[name], rtol=1e-4, atol=1e-5)
    for name in ("train/accuracy", "train/loss", "validation/loss"):
        torch.testing.assert_close(fused.members[name], hooked.members[name])


def test_a_step_makes_logits_for_about_as_many_positions_as_have_labels(tmp_path, monkeypatch):
    counts = []

    def spy(x_SBTD, weight_SVD, labels, most, double):
        counts.append((int((labels != IGNORE).sum()), most))
        return training_loss(x_SBTD, weight_SVD, labels, most, double)

    training_loss = training.linear_member_losses
    monkeypatch.setattr(training, "linear_member_losses", spy)
    module = GroundThink(**SIZES)
    fit(module, tmp_path)
    assert counts == [(8, 8)] * 4  # 4 rows of 2 queries, of 64 positions
    module.losses(**batch())
    assert counts[-1][1] is None  # the count is that of the last training batch, not of this one


def test_a_training_step_waits_for_no_value_of_the_device():
    module = GroundThink(**SIZES, **BOTH | {"beta_sparsity": Penalty(1.0, 3, 0.5)}, pattern="GS")
    module._most_labelled = 32
    with Waits() as waits:
        module.training_step(batch(), 0).backward()
    assert not waits.seen
    with Waits() as waits:
        module(batch()["tokens"]).sum().item()
    assert waits.seen  # the test sees one that is there


def test_the_loss_of_every_option_is_one_graph(monkeypatch):
    """`torch.compile` traces it without a break; the backend that runs the graph has no part in that."""
    monkeypatch.setattr(losses, "CHUNK", 10 * 16)  # several chunks
    options = BOTH | {"keys": "both", "rotary_keys": True, "shifted_value": True, "window_reads_state": True}
    module = GroundThink(**SIZES, **options, key_bank=KeyBank(1, 3, learned=True))
    compiled = torch.compile(module.losses, fullgraph=True, backend="eager")
    (loss_S, outputs), (expected_S, wanted) = compiled(**batch()), module.losses(**batch())
    torch.testing.assert_close((loss_S, *outputs), (expected_S, *wanted))


class Waits(TorchDispatchMode):
    """Notes the operators that need a value on the host."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_recorded_step_is_that_of_batches_with_as_many_labels(tmp_path, monkeypatch):
    """Rows of one length may have few labels or many, and a record has a fixed number of logits."""

    def record(step, inputs, batch):
        recorded = module._most_labelled

        def replay(*batch):
            module._most_labelled, counted = recorded, module._most_labelled
            outputs = inputs(*batch)
            module._most_labelled = counted
            return outputs

        return replay

    monkeypatch.setattr(GraphedStep, "_record", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    found = []
    for graphed in (False, True):
        module, data = (
            GraphedThink(**SIZES | {"vocab_size": 64}),
            AssociativeRecall(64, train_sets=[[16, 1, 8], [16, 4, 8]], test_sets=[[16, 1]], batch_size=4),
        )
        module.graphed = graphed
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=8,
            default_root_dir=tmp_path, enable_checkpointing=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, data)
        found.append(module.seen)
    assert found[0] == found[1]
    assert len({most for most, _ in found[0]}) == 2


class GraphedThink(GroundThink):
    """Records its steps on a CPU, and notes the number of logits and the loss of each step."""

    def on_fit_start(self):
        self.seen = []
        if self.graphed:
            self._step = GraphedStep(self, self._losses_and_outputs, self.step_variant)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.append((self._most_labelled, loss.item()))
        return loss
