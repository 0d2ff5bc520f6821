"""Evaluations run with the donor's parameters, and then the model has its own parameters again."""

import pytest
import torch
from conftest import QUIET
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader
from toy_attention import QK, TOKENS, Failing, Model, Sequences, assert_equal, state_of

from callbacks.base import ReleasingCallback
from callbacks.parameter_swap import ParameterSwap
from datamodules.errors import UserError
from lightning_modules.core.sites import match_parameters
from lightning_modules.core.swapping import swap_parameters


def trainer_of(tmp_path, *callbacks, **flags):
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), **QUIET | flags)


def checkpoint(module, path):
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": "2.0.0"}, path)
    return str(path)


def loader():
    return DataLoader(Sequences(), batch_size=4)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("members", [1, 2])
def test_stages_evaluate_the_restored_model_with_the_donors_parameters(stage, members, tmp_path):
    model, donor = Model(0, members), Model(1, members)
    path, donor_path = checkpoint(model, tmp_path / "model.ckpt"), checkpoint(donor, tmp_path / "donor.ckpt")
    with swap_parameters(model, donor.state_dict(), QK):
        expected = model(TOKENS)
    restored = Model(7, members)  # Lightning loads the parameters of `model` after the callback's setup
    trainer = trainer_of(tmp_path, ParameterSwap(donor_path))
    quiet = {} if stage == "predict" else {"verbose": False}
    getattr(trainer, stage)(restored, loader(), ckpt_path=path, weights_only=True, **quiet)
    assert torch.equal(restored.outputs[0], expected)
    assert_equal(state_of(restored), state_of(model))


def test_self_swap_of_a_checkpoint_changes_no_bit(tmp_path):
    model, plain = Model(0), Model(0)
    path = checkpoint(model, tmp_path / "model.ckpt")
    trainer_of(tmp_path, ParameterSwap(path, parameters=["*"])).test(model, loader(), verbose=False)
    trainer_of(tmp_path).test(plain, loader(), verbose=False)
    assert torch.equal(model.outputs[0], plain.outputs[0])


def test_random_and_procrustes_reach_the_model(tmp_path):
    model, donor = Model(0), Model(1)
    path = checkpoint(donor, tmp_path / "donor.ckpt")
    swaps = {"random": ParameterSwap(mode="random", seed=4), "procrustes": ParameterSwap(path, mode="procrustes")}
    for mode, callback in swaps.items():
        with swap_parameters(model, donor.state_dict(), QK, mode, seed=4):
            expected = model(TOKENS)
        model.outputs = []
        trainer_of(tmp_path, callback).test(model, loader(), verbose=False)
        assert torch.equal(model.outputs[0], expected)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_parameters_are_restored_when_the_evaluation_fails(stage, tmp_path):
    module = Failing(0)
    before = state_of(module)
    callback = ParameterSwap(checkpoint(Model(1), tmp_path / "donor.ckpt"))
    with pytest.raises(RuntimeError, match="lost"):
        getattr(trainer_of(tmp_path, callback), stage)(module, loader())
    assert_equal(state_of(module), before)


class Watching(Callback):
    """Puts parameters of 1 in place at the start of a test, and keeps those that it finds at the end."""

    def on_test_start(self, trainer, pl_module):
        for parameter in pl_module.parameters():
            parameter.data.fill_(1.0)

    def on_test_end(self, trainer, pl_module):
        self.found = state_of(pl_module)


class Filling(ReleasingCallback):
    """Puts parameters of 1 in place for a test, as `BestValidation` does with its copy."""

    def on_test_start(self, trainer, pl_module):
        self.own = {parameter: parameter.detach().clone() for parameter in pl_module.parameters()}
        for parameter in self.own:
            parameter.data.fill_(1.0)

    def _release(self):
        for parameter, value in self.own.items():
            parameter.data.copy_(value)
        self.own = {}


@pytest.mark.parametrize("first", [True, False])
def test_parameters_are_restored_when_a_test_with_other_replacements_fails(first, tmp_path):
    module = Failing(0)
    before = state_of(module)
    swap, filling = ParameterSwap(checkpoint(Model(1), tmp_path / "donor.ckpt")), Filling()
    with pytest.raises(RuntimeError, match="lost"):
        trainer_of(tmp_path, *((swap, filling) if first else (filling, swap))).test(module, loader())
    assert_equal(state_of(module), before)


@pytest.mark.parametrize("first", [True, False])
def test_callbacks_see_the_values_at_start_and_end_whatever_their_order(first, tmp_path):
    donor, watching = Model(1), Watching()
    swap = ParameterSwap(checkpoint(donor, tmp_path / "donor.ckpt"))
    model = Model(0)
    trainer_of(tmp_path, *((swap, watching) if first else (watching, swap))).test(model, loader(), verbose=False)
    names = match_parameters(model, QK)
    assert names
    for name, value in watching.found.items():
        expected = donor.state_dict()[name] if name in names else torch.ones_like(value)
        assert torch.equal(value, expected), name
    assert all((value == 1).all() for value in model.state_dict().values())


def test_two_swaps_need_different_parameters(tmp_path):
    def run_test(*patterns):
        swaps = [ParameterSwap(mode="random", parameters=[pattern]) for pattern in patterns]
        trainer_of(tmp_path, *swaps).test(Model(0), loader(), verbose=False)

    run_test("*.q_proj.*", "*.k_proj.*")
    with pytest.raises(UserError, match=r"^Two ParameterSwap callbacks would replace '.*q_proj.weight'; keep one"):
        run_test("*.q_proj.*", "*proj.weight")


def test_user_errors(tmp_path):
    path = checkpoint(Model(1), tmp_path / "donor.ckpt")

    def run_test(*args, **options):
        trainer_of(tmp_path, ParameterSwap(*args, **options)).test(Model(0), loader(), verbose=False)

    with pytest.raises(ValueError, match="acts on validate, test and predict"):
        trainer_of(tmp_path, ParameterSwap(path)).fit(Model(0), loader())
    with pytest.raises(ValueError, match=r"\(mode='copy'\) needs `donor`"):
        ParameterSwap()
    with pytest.warns(UserWarning, match=r"\(mode='random'\) ignores `donor`"):
        ParameterSwap(path, mode="random")
    with pytest.raises(UserError, match=r"^ParameterSwap: `seed` must be an integer from 0"):
        ParameterSwap(mode="random", seed=-1)
    with pytest.raises(UserError, match=r"^ParameterSwap's donor: there is no file .*did you mean .*donor.ckpt"):
        run_test(str(tmp_path / "doner.ckpt"))
    with pytest.raises(ValueError, match="is a folder, name a checkpoint file"):
        run_test(str(tmp_path))
    with pytest.raises(ValueError, match=r"ParameterSwap\.parameters: no parameter matches 'q_porj'; the nearest"):
        run_test(path, ["q_porj"])
    torch.save({"weights": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is not the checkpoint of a run, it has no 'state_dict'"):
        run_test(str(tmp_path / "other.ckpt"))
    (tmp_path / "damaged.ckpt").write_bytes((tmp_path / "donor.ckpt").read_bytes()[:2000])
    with pytest.raises(
        ValueError, match=r"^ParameterSwap's donor: .*damaged.ckpt is damaged .*; the newest intact one"
    ):
        run_test(str(tmp_path / "damaged.ckpt"))
