"""A run whose loss or weights are not finite ends as diverged, and its last finite checkpoint stays."""

import json
from pathlib import Path

import pytest
import torch
from lightning import Callback
from toy_fit import SIZES, fit, held

from callbacks import LastCheckpoint
from callbacks.divergence import Diverged, Divergence, nonfinite_parameter
from callbacks.run_record import RunRecord
from lightning_modules.separability import Separability


class Spoil(Callback):
    """Makes weights NaN after an optimizer step."""

    def __init__(self, step: int, members: list[int] | None = None, amount: float = torch.nan) -> None:
        self.step, self.members, self.amount = step, members, amount

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            weight = pl_module.network.unembed.weight.data
            (weight if self.members is None else weight[self.members]).mul_(self.amount)
            if self.members is not None:
                weight[self.members] *= self.amount


def record(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def diverge(folder: Path, steps: int, spoil: Spoil, **options) -> tuple[Diverged, dict]:
    with pytest.raises(Diverged) as ended:
        fit(folder, steps, [Divergence(), RunRecord(), spoil], LastCheckpoint(), **options)
    return ended.value, record(folder)


def test_it_is_told_at_the_first_logged_step_and_the_last_finite_checkpoint_stays(tmp_path):
    error, found = diverge(tmp_path, 40, Spoil(5), log_every_n_steps=7)
    assert (error.step, found["steps"]) == (6, 7)
    assert (found["status"], found["step"]) == ("diverged", 6)
    assert found["reason"] == "the loss is not finite"
    assert found["metrics"] == found["intervals"] == found["n"] == {}
    assert held(tmp_path)["global_step"] == 4
    assert all(value.isfinite().all() for value in held(tmp_path)["state_dict"].values())


def test_weights_are_looked_at_before_they_are_saved(tmp_path):
    error, found = diverge(tmp_path, 40, Spoil(8), log_every_n_steps=50)  # at a validation, with the loss still finite
    assert str(error) == "the run has diverged: network.unembed.weight is not finite since step 8"
    assert found["status"] == "diverged"
    assert held(tmp_path)["global_step"] == 4


def test_also_after_the_last_step(tmp_path):
    error, _ = diverge(tmp_path, 3, Spoil(3), log_every_n_steps=50, limit_val_batches=0)
    assert error.step == 3
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("spoiled", "reason"), [(2, "the loss is not finite"), (3, "network.unembed.weight is not finite")]
)
def test_a_run_without_checkpoints_is_looked_at_after_its_last_step(tmp_path, spoiled, reason):
    quiet = {"enable_checkpointing": False, "log_every_n_steps": 50, "limit_val_batches": 0}
    with pytest.raises(Diverged, match=f"{reason} since step 3"):
        fit(tmp_path, 3, [Divergence(), Spoil(spoiled)], Callback(), **quiet)


def test_also_before_the_first_optimizer_step(tmp_path):
    class First(Separability):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (torch.nan if batch_idx == 0 else 0)

    with pytest.raises(Diverged, match="the loss is not finite since step 0"):
        fit(tmp_path, 3, [Divergence()], make=First, accumulate_grad_batches=3)


@pytest.mark.parametrize(
    ("method", "others", "said"),
    [
        ("reduce", lambda value, reduce_op="mean": value.clamp(min=7) if reduce_op == "max" else value, "since step 7"),
        ("reduce_boolean_decision", lambda decision, all=True: decision or not all, "a parameter is not finite"),
    ],
)
def test_what_another_rank_has_seen_ends_the_run_here_too(tmp_path, method, others, said):
    class OtherRank(Callback):
        def on_train_start(self, trainer, pl_module):
            setattr(trainer.strategy, method, others)

    with pytest.raises(Diverged, match=said):
        fit(tmp_path, 2, [Divergence(), OtherRank()])


class Lost(Separability):
    """Has a loss of NaN in the second step, with finite gradients."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (torch.nan if self.global_step == 1 else 0)


@pytest.mark.parametrize("saves", [True, False])
def test_a_lost_loss_is_told_before_a_checkpoint_and_after_a_validation(tmp_path, saves):
    options = {"enable_checkpointing": saves, "log_every_n_steps": 50, "make": Lost}
    with pytest.raises(Diverged, match="the loss is not finite since step 2"):
        fit(tmp_path, 8, [Divergence(), RunRecord()], None if saves else Callback(), **options)
    assert record(tmp_path)["steps"] == 4
    assert not (tmp_path / "checkpoints").exists()


def test_a_held_out_loss(tmp_path):
    class Validation(Separability):
        def validation_step(self, batch, batch_idx):
            self.log("validation/other/loss", torch.tensor(torch.inf))
            super().validation_step(batch, batch_idx)

    error, _ = diverge(tmp_path, 9, Spoil(100), make=Validation)
    assert str(error) == "the run has diverged: validation/other/loss is not finite since step 4"


def test_a_measure_that_ends_in_loss_is_no_loss(tmp_path):
    class Validation(Separability):
        def validation_step(self, batch, batch_idx):
            self.log("validation/orthogonal_loss", torch.tensor(torch.nan))
            self.log("memory/loss", torch.tensor(torch.nan))
            super().validation_step(batch, batch_idx)

    fit(tmp_path, 9, [Divergence(), RunRecord()], LastCheckpoint(), make=Validation)
    assert record(tmp_path)["status"] == "finished"


def test_it_goes_on_where_the_model_says_so(tmp_path):
    class Goes(Separability):
        def __init__(self, **options):
            super().__init__(**options, on_nonfinite="continue")

    module = fit(tmp_path, 9, [Divergence(), RunRecord(), Spoil(2)], make=Goes, log_every_n_steps=1)
    assert module.global_step == 9
    assert record(tmp_path)["status"] == "finished"
    assert record(tmp_path)["metrics"]["validation/accuracy"] is None


def test_one_value_of_each_member_is_enough():
    module = Separability(**SIZES, ensemble=2)
    assert nonfinite_parameter(module) is None
    names = [name for name, _ in module.named_parameters()]
    for member, place in enumerate((2, 3)):
        assert nonfinite_parameter(module) is None
        module.get_parameter(names[place]).data[member].view(-1)[0] = torch.inf
    assert nonfinite_parameter(module) == names[2]


def test_weights_that_are_not_trained_are_left_alone(tmp_path):
    class Masked(Separability):
        def __init__(self, **options):
            super().__init__(**options)
            self.mask = torch.nn.Parameter(torch.tensor([torch.nan]), requires_grad=False)

    assert fit(tmp_path, 2, [Divergence()], make=Masked).global_step == 2


@pytest.mark.parametrize("every", [0, 1])
def test_a_step_without_a_loss_and_a_run_without_logs_go_on(tmp_path, every):
    class Skips(Separability):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx else None

    assert fit(tmp_path, 3, [Divergence()], make=Skips, log_every_n_steps=every).global_step == 3


@pytest.mark.parametrize(("members", "ends"), [([1], False), ([0, 1], True)], ids=["one of two", "all"])
def test_an_ensemble_has_diverged_when_all_its_members_have(tmp_path, members, ends):
    class Two(Separability):
        def __init__(self, **options):
            super().__init__(**options, ensemble=2)

    if ends:
        error, found = diverge(tmp_path, 9, Spoil(2, members), make=Two, log_every_n_steps=3)
        assert error.step == 3
        assert "members" not in found
    else:
        module = fit(tmp_path, 9, [Divergence(), RunRecord(), Spoil(2, members)], make=Two, log_every_n_steps=3)
        assert module.global_step == 9
        assert [value is None for value in record(tmp_path)["members"]["validation/accuracy"]] == [False, True]


def test_finding_it_out_does_not_wait_for_the_device(tmp_path, monkeypatch):
    reads = []
    read = torch.Tensor.__int__

    def count(x):
        reads.append(1)
        return read(x)

    monkeypatch.setattr(torch.Tensor, "__int__", count)
    fit(tmp_path, 12, [Divergence()], log_every_n_steps=100, limit_val_batches=0)
    assert len(reads) <= 2  # the last step, and the checkpoint
