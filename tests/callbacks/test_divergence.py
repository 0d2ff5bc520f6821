"""A run whose loss or weights are not finite ends as diverged, and its last finite checkpoint stays."""

import json
from pathlib import Path

import pytest
import torch
from lightning import Callback
from toy_fit import fit, held

from callbacks import LastCheckpoint
from callbacks.divergence import Diverged, Divergence
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
            super().validation_step(batch, batch_idx)

    fit(tmp_path, 9, [Divergence(), RunRecord()], LastCheckpoint(), make=Validation)
    assert record(tmp_path)["status"] == "finished"


def test_it_goes_on_where_the_model_says_so(tmp_path):
    class Goes(Separability):
        def __init__(self, **options):
            super().__init__(**options, on_nonfinite="continue")

    module = fit(tmp_path, 9, [Divergence(), RunRecord(), Spoil(2)], make=Goes)
    assert module.global_step == 9
    assert record(tmp_path)["status"] == "finished"
    assert record(tmp_path)["metrics"]["validation/accuracy"] is None


@pytest.mark.parametrize(("members", "ends"), [([1], False), ([0, 1, 2], True)], ids=["one of three", "all"])
def test_an_ensemble_has_diverged_when_all_its_members_have(tmp_path, members, ends):
    class Three(Separability):
        def __init__(self, **options):
            super().__init__(**options, ensemble=3)

    if ends:
        error, found = diverge(tmp_path, 9, Spoil(2, members), make=Three, log_every_n_steps=3)
        assert error.step == 3
        assert "members" not in found
    else:
        module = fit(tmp_path, 9, [Divergence(), RunRecord(), Spoil(2, members)], make=Three, log_every_n_steps=3)
        assert module.global_step == 9
        assert [value is None for value in record(tmp_path)["members"]["validation/accuracy"]] == [False, True, False]


def test_finding_it_out_does_not_wait_for_the_device(tmp_path, monkeypatch):
    reads = []
    read = torch.Tensor.__int__

    def count(x):
        reads.append(1)
        return read(x)

    monkeypatch.setattr(torch.Tensor, "__int__", count)
    fit(tmp_path, 12, [Divergence()], log_every_n_steps=100, limit_val_batches=0)
    assert len(reads) <= 2  # the last step, and the checkpoint
