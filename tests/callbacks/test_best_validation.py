"""The test measures each member's parameters of the lowest held-out loss, also after a resume; training is the same."""

import pytest
import torch
from conftest import QUIET
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader
from toy_fit import StopAt, Stopped

from callbacks.best_validation import BestValidation
from callbacks.last_checkpoint import LastCheckpoint
from datamodules.errors import UserError

LOSSES = torch.tensor([[3.0, torch.nan, 2.0], [2.0, 5.0, 3.0], [1.0, 4.0, 2.5], [2.0, 6.0, 2.0]])  # 4 validations
BEST = [6.0, 6.0, 2.0]  # a validation after 2, 4, 6 and 8 steps


class Counter(LightningModule):
    """Each parameter is the number of steps; the losses of a validation are those of the table."""

    def __init__(self, ensemble=3):
        super().__init__()
        self.ensemble, self.members, self.tested = ensemble, {}, None
        shape = [ensemble] if ensemble > 1 else []
        self.vector, self.matrix = nn.Parameter(torch.zeros(*shape, 4)), nn.Parameter(torch.zeros(*shape, 2, 3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def training_step(self, batch, batch_idx):
        return -self.vector.sum() - self.matrix.sum()

    def validation_step(self, batch, batch_idx):
        loss_S = LOSSES[max(0, self.global_step // 2 - 1), : self.ensemble]
        self.members["validation/loss"] = loss_S
        self.log("validation/loss", loss_S.nanmean())

    def test_step(self, batch, batch_idx):
        self.tested = [parameter.detach().clone() for parameter in (self.vector, self.matrix)]

    def configure_optimizers(self):
        return torch.optim.SGD([self.vector, self.matrix], 1.0)


DATA = DataLoader(torch.zeros(8), batch_size=1)


def trainer(folder, *callbacks, **options):
    flags = QUIET | {"accelerator": "cpu", "max_steps": 8, "val_check_interval": 2, "default_root_dir": folder}
    return Trainer(**flags | options, callbacks=list(callbacks))


def assert_tested(module, steps):
    for tested in module.tested:
        assert [member.unique().tolist() for member in tested] == [[step] for step in steps]


@pytest.mark.parametrize("ensemble", [2, 3])
def test_each_member_is_tested_with_its_best_parameters_and_then_has_its_own(tmp_path, ensemble):
    module, runner = Counter(ensemble), trainer(tmp_path, BestValidation())
    runner.fit(module, DATA, DATA)
    assert (module.vector == 8).all()
    runner.test(module, DATA, verbose=False)
    assert_tested(module, BEST[:ensemble])
    assert (module.vector == 8).all()
    assert (module.matrix == 8).all()
    assert (module.frozen == 1).all()
    assert module.members["validation/best_step"].tolist() == BEST[:ensemble]


def test_a_single_module_is_tested_with_its_best_parameters(tmp_path):
    module, runner = Counter(ensemble=1), trainer(tmp_path, BestValidation())
    runner.fit(module, DATA, DATA)
    runner.test(module, DATA, verbose=False)
    assert module.tested[0].tolist() == [6.0] * 4


@pytest.mark.parametrize("stop", [5, 7])
def test_a_resumed_fit_and_a_test_of_its_checkpoint_have_the_best_parameters_of_both_parts(tmp_path, stop):
    keep = {"enable_checkpointing": True}
    first = trainer(tmp_path, BestValidation(), LastCheckpoint(), StopAt("on_train_batch_start", stop), **keep)
    with pytest.raises(Stopped):
        first.fit(Counter(), DATA, DATA)
    last = tmp_path / "checkpoints" / "last.ckpt"
    runner = trainer(tmp_path, BestValidation(), LastCheckpoint(), **keep)
    runner.fit(module := Counter(), DATA, DATA, ckpt_path=last, weights_only=True)
    runner.test(module, DATA, verbose=False)
    assert_tested(module, BEST)
    other = Counter()
    trainer(tmp_path, BestValidation()).test(other, DATA, ckpt_path=last, verbose=False, weights_only=True)
    assert_tested(other, BEST)
    assert (other.vector == 8).all()


def test_a_second_fit_begins_without_the_copy_of_the_first(tmp_path):
    best = BestValidation()
    trainer(tmp_path, best).fit(Counter(), DATA, DATA)
    module, runner = Counter(), trainer(tmp_path, best, max_steps=2)
    runner.fit(module, DATA, DATA)
    runner.test(module, DATA, verbose=False)
    assert_tested(module, [2.0, 2.0, 2.0])
    assert module.members["validation/best_step"].nan_to_num(0).tolist() == [2, 0, 2]


def test_a_fit_after_a_test_keeps_its_parameters(tmp_path):
    module, runner = Counter(), trainer(tmp_path, best := BestValidation())
    runner.fit(module, DATA, DATA)
    runner.test(module, DATA, verbose=False)
    trainer(tmp_path, best, max_steps=2).fit(module, DATA, DATA)
    assert (module.vector == 10).all()


def test_only_the_validations_of_a_fit_count(tmp_path):
    best = BestValidation()
    trainer(tmp_path, best).validate(Counter(), DATA, verbose=False)
    trainer(tmp_path, best, num_sanity_val_steps=1, val_check_interval=2, max_steps=1).fit(Counter(), DATA, DATA)
    assert best.state_dict()["best"] == {}


def test_a_fit_without_validation_is_tested_at_its_last_step_with_a_warning(tmp_path):
    module, runner = Counter(), trainer(tmp_path, BestValidation(), limit_val_batches=0)
    runner.fit(module, DATA)
    with pytest.warns(UserWarning, match="has no copy, because the fit had no validation"):
        runner.test(module, DATA, verbose=False)
    assert_tested(module, [8.0, 8.0, 8.0])


@pytest.mark.parametrize(("ensemble", "steps"), [(1, [8.0]), (3, [6.0, 8.0, 2.0])])
def test_without_a_finite_held_out_loss_the_last_step_is_tested_with_a_warning(tmp_path, monkeypatch, ensemble, steps):
    losses = LOSSES.clone()
    losses[:, len(steps) // 2] = torch.tensor([torch.nan, torch.inf, torch.nan, torch.inf])
    monkeypatch.setitem(globals(), "LOSSES", losses)
    module, runner = Counter(ensemble), trainer(tmp_path, BestValidation())
    runner.fit(module, DATA, DATA)
    whose = "1 of 3 members" if ensemble > 1 else "the model"
    with pytest.warns(UserWarning, match=f"no held-out loss of {whose} was finite: the last step is tested"):
        runner.test(module, DATA, verbose=False)
    tested_S = module.tested[0].reshape(ensemble, 4)
    assert tested_S.tolist() == [[step] * 4 for step in steps]
    best_S = module.members["validation/best_step"]
    assert best_S.isnan().tolist() == [step == 8 for step in steps]
    assert (module.vector == 8).all()


def test_a_module_without_a_held_out_loss_is_refused(tmp_path):
    module = Counter()
    module.validation_step = lambda batch, batch_idx: None
    with pytest.raises(UserError, match="BestValidation needs validation/loss, and Counter does not log it"):
        trainer(tmp_path, BestValidation()).fit(module, DATA, DATA)


def test_an_average_of_the_weights_is_what_is_copied_and_tested(tmp_path):
    average = EMAWeightAveraging(decay=0.5)
    module, runner = Counter(ensemble=1), trainer(tmp_path, BestValidation(), average)
    runner.fit(module, DATA, DATA)
    runner.test(module, DATA, verbose=False)
    expected = 1.0  # after the first step
    for step in range(2, 7):
        expected = 0.5 * expected + 0.5 * step
    torch.testing.assert_close(module.tested[0], torch.full((4,), expected))
