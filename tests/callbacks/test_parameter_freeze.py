"""A frozen parameter does not change by one bit; all others change."""

import copy
from functools import partial

import pytest
import torch
from conftest import QUIET
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks.parameter_freeze import ParameterFreeze
from datamodules import StateTracking
from lightning_modules.groundthink import GroundThink

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
OPTIMIZERS = {
    "adamw": ADAMW,
    "adamw_foreach": partial(ADAMW, foreach=True),
    "adamw_fused": partial(ADAMW, fused=True),
    "adam": partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
}
FROZEN = ["net.0.*", "net.2.bias"]
FROZEN_NAMES = {"net.0.weight", "net.0.bias", "net.2.bias"}


class Regression(LightningModule):
    def __init__(self, optimizer=ADAMW):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.net(x).squeeze(-1) - y).square().mean()

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Snapshots(Callback):
    """Copies of the parameters and of the optimizer's state after some steps."""

    def __init__(self, *steps):
        self.steps = steps
        self.parameters = {}
        self.states = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        step = trainer.global_step
        if step in self.steps and step not in self.parameters:
            self.parameters[step] = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            state = trainer.optimizers[0].state
            self.states[step] = {name: copy.deepcopy(dict(state[p])) for name, p in pl_module.named_parameters()}


def loader(n=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1).sin()), batch_size=8)


def fit(module, tmp_path, callbacks, ckpt_path=None, max_steps=-1, max_epochs=1000, **flags):
    flags = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False} | flags
    trainer = Trainer(
        max_steps=max_steps,
        max_epochs=max_epochs,
        callbacks=callbacks,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **flags,
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


def assert_only_frozen_stayed(before, after):
    stayed = {name for name in before if torch.equal(before[name], after[name])}
    assert stayed == FROZEN_NAMES


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("at_step", [0, 5])
def test_frozen_parameters_are_bit_identical_for_200_steps_and_others_move(name, at_step, tmp_path):
    module = Regression(OPTIMIZERS[name])
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    snapshots = Snapshots(5, 205)
    fit(module, tmp_path, [ParameterFreeze(FROZEN, at_step), snapshots], max_steps=205)
    if at_step:
        before = snapshots.parameters[5]
        # The parameters were trained until then, and their moments would move them on. The moments stay too.
        unfrozen = Snapshots(5)
        fit(Regression(OPTIMIZERS[name]), tmp_path, [unfrozen], max_steps=5)
        for parameter in before:
            assert torch.equal(before[parameter], unfrozen.parameters[5][parameter])
        for parameter in FROZEN_NAMES:
            moments = snapshots.states[5][parameter]
            assert moments
            torch.testing.assert_close(moments, snapshots.states[205][parameter], rtol=0, atol=0)
    assert_only_frozen_stayed(before, snapshots.parameters[205])


@pytest.mark.parametrize(
    "flags", [{"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}], ids=lambda f: next(iter(f))
)
def test_under_accumulation_and_mixed_precision(flags, tmp_path):
    snapshots = Snapshots(4, 20)
    fit(Regression(), tmp_path, [ParameterFreeze(FROZEN, 4), snapshots], max_steps=20, gradient_clip_val=0.1, **flags)
    assert_only_frozen_stayed(snapshots.parameters[4], snapshots.parameters[20])


class Norms(Regression):
    """Records the parameters that clipping sees, and the norm of their gradients."""

    def __init__(self):
        super().__init__()
        self.clipped = []

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        self.clipped.append({name for name, p in self.named_parameters() if p.grad is not None})
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.norm = torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm()


@pytest.mark.parametrize("at_step", [0, 2])
def test_frozen_gradients_stay_out_of_the_clipped_norm(at_step, tmp_path):
    module = Norms()
    everything = {name for name, _ in module.named_parameters()}
    fit(module, tmp_path, [ParameterFreeze(FROZEN, at_step)], max_steps=4, gradient_clip_val=1e-3)
    assert module.clipped == [everything] * at_step + [everything - FROZEN_NAMES] * (4 - at_step)
    # The norm of the trained gradients alone is the clipping value.
    torch.testing.assert_close(module.norm, torch.tensor(1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("at_step", [0, 4, 12])
def test_resuming_before_or_after_the_freeze_changes_nothing(at_step, tmp_path):
    straight = Regression()
    fit(straight, tmp_path, [ParameterFreeze(FROZEN, at_step)], max_epochs=2)

    first = fit(Regression(), tmp_path, [ParameterFreeze(FROZEN, at_step)], max_epochs=1)
    assert first.global_step == 8
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Regression()
    for parameter in resumed.parameters():
        nn.init.zeros_(parameter)
    fit(resumed, tmp_path, [ParameterFreeze(FROZEN, at_step)], ckpt_path=tmp_path / "half.ckpt", max_epochs=2)
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_after_fit_the_parameters_require_gradients_as_before(tmp_path):
    module = Regression()
    module.net[2].bias.requires_grad_(False)
    fit(module, tmp_path, [ParameterFreeze(FROZEN)], max_steps=2)
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {"net.2.bias"}


def test_parameters_require_gradients_after_a_failed_run(tmp_path):
    class Failing(Regression):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("fails")

    module = Failing()
    with pytest.raises(RuntimeError, match="fails"):
        fit(module, tmp_path, [ParameterFreeze(FROZEN)], max_steps=2)
    assert all(p.requires_grad for p in module.parameters())


def test_an_ensemble_of_which_everything_is_frozen_is_not_clipped(tmp_path):
    data = StateTracking(train_len=8, test_len=8, batch_size=2, validation_size=2, test_size=2)
    module = GroundThink(6, 8, width=16, pattern="G", ensemble=2)
    flags = {"accelerator": "cpu", "max_steps": 3, "default_root_dir": tmp_path, "gradient_clip_val": 1.0}
    Trainer(callbacks=[ParameterFreeze(["*"], at_step=1)], **QUIET | flags).fit(module, datamodule=data)
    assert module.trainer.global_step == 3


def test_user_errors(tmp_path):
    with pytest.raises(ValueError, match=r"'net.9.weight'.*'net.0.weight'"):
        fit(Regression(), tmp_path, [ParameterFreeze(["net.9.weight"], at_step=5)], max_steps=1)
    with pytest.raises(ValueError, match="-1"):
        ParameterFreeze(FROZEN, at_step=-1)
    with pytest.raises(ValueError, match=r"\['\*'\] at step 0 leaves nothing to train"):
        fit(Regression(), tmp_path, [ParameterFreeze(["*"])], max_steps=1)


def test_two_freezes_have_different_state_keys():
    assert ParameterFreeze(FROZEN).state_key != ParameterFreeze(FROZEN, at_step=3).state_key


class Buffered(Regression):
    """Carries the weight at step 3 out of the processes in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("at_step_3", torch.zeros_like(self.net[0].weight))
        self.register_buffer("world_size", torch.tensor(0))

    def on_train_batch_end(self, *_):
        self.world_size.fill_(self.trainer.world_size)
        if self.trainer.global_step == 3:
            self.at_step_3.copy_(self.net[0].weight.detach())


@pytest.mark.parametrize("at_step", [0, 3])
def test_two_processes(at_step, tmp_path):
    module = Buffered()
    initial = module.net[0].weight.detach().clone()
    last = module.net[4].weight.detach().clone()
    freeze = ParameterFreeze(FROZEN, at_step)
    # A fork takes 0.1 s and a spawn 5 s, but processes must not fork after a use of CUDA.
    strategy = "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"
    fit(module, tmp_path, [freeze], max_steps=6, strategy=strategy, devices=2, enable_checkpointing=True)
    assert module.world_size == 2
    assert torch.equal(module.net[0].weight, module.at_step_3)
    assert torch.equal(module.at_step_3, initial) == (at_step == 0)
    assert not torch.equal(module.net[4].weight, last)
