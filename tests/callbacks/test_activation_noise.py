"""Noise has the right length, is the same when repeated, and differs between the members of an ensemble."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import QUIET
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.data import DataLoader

from callbacks.activation_clamp import ActivationClamp
from callbacks.activation_noise import ActivationNoise, add_noise
from lightning_modules.core.graphs import is_watched


def seeded():
    return torch.Generator().manual_seed(0)


def test_relative_noise_scales_with_each_position():
    x = torch.randn(3, 40, 4096) * torch.rand(3, 40, 1).mul(5).exp()
    x[0, 0] = 0
    ratio = (add_noise(x, 0.3, True, seeded()) - x).norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-9)
    assert ratio[0, 0] == 0
    torch.testing.assert_close(ratio.flatten()[1:], torch.full((119,), 0.3), rtol=0.06, atol=0)


def test_the_length_of_absolute_noise_does_not_depend_on_x():
    x = torch.randn(3, 40, 4096) * 100
    length = (add_noise(x, 2.0, False, seeded()) - x).norm(dim=-1)
    torch.testing.assert_close(length, torch.full((3, 40), 2.0), rtol=0.06, atol=0)


def test_noise_is_standard_normal_by_element():
    x = torch.zeros(1000, 64)
    noise = add_noise(x, math.sqrt(64), False, seeded())
    torch.testing.assert_close(torch.stack(torch.std_mean(noise)), torch.tensor([1.0, 0.0]), rtol=0, atol=0.02)


@pytest.mark.parametrize("relative", [True, False])
def test_gradient_passes_unchanged(relative):
    x = torch.randn(4, 8, requires_grad=True)
    add_noise(x, 0.5, relative, seeded()).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


class Pair(nn.Module):
    """Returns a tuple, like attention with a cache."""

    def forward(self, x):
        return x, "cache"


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 8)
        self.residual = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.pair = Pair()

    def forward(self, x):
        x = self.mix(x)
        first = self.residual[0](x)
        paired, cache = self.pair(x)
        assert cache == "cache"
        return torch.stack([x, first, self.residual[1](x), paired])


class Watched(LightningModule):
    """Keeps its outputs by stage; a vmapped ensemble if `members` is above 1."""

    def __init__(self, members=1):
        super().__init__()
        torch.manual_seed(0)
        self.ensemble = members
        self.network = Network()
        self.stacked, _ = stack_module_state([self.network] * members)
        self.outputs = {"train": [], "validate": [], "test": [], "sanity_check": [], "predict": []}

    def forward(self, x):
        if self.ensemble == 1:
            return self.network(x)
        call = vmap(lambda p: functional_call(self.network, p, (x,)), randomness="different")
        return call(dict(self.stacked))

    def training_step(self, batch, batch_idx):
        outputs = self(batch)
        self.outputs[self.trainer.state.stage.value].append(outputs.detach())
        return outputs.square().mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.outputs[self.trainer.state.stage.value].append(self(batch))

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loader():
    return DataLoader(torch.ones(6, 4), batch_size=2)


def trainer_of(tmp_path, *callbacks, **flags):
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), **QUIET | flags)


def run_test(module, tmp_path, *callbacks, loaders=None):
    module.outputs["test"] = []
    trainer_of(tmp_path, *callbacks).test(module, loaders or loader(), verbose=False)
    return module.outputs["test"]


@pytest.mark.parametrize("during", ["validate", "fit"])
@pytest.mark.parametrize("made", [partial(ActivationNoise, strength=0.1), partial(ActivationClamp, mode="zero")])
def test_training_steps_are_watched_only_where_the_hooks_act_in_them(tmp_path, made, during):
    class Steps(Watched):
        def training_step(self, batch, batch_idx):
            self.watched = is_watched(self)
            return super().training_step(batch, batch_idx)

    module = Steps()
    trainer_of(tmp_path, made("residual.*", during=[during]), max_steps=1).fit(module, loader())
    assert module.watched is (during == "fit")


def test_noise_depends_on_module_batch_loader_and_seed_and_on_nothing_else(tmp_path):
    noise = ActivationNoise("residual.*", 0.1)
    outputs = run_test(Watched(), tmp_path, noise, loaders=[loader(), loader()])
    torch.manual_seed(77)
    again = run_test(Watched(), tmp_path, noise, loaders=[loader(), loader()])
    other = run_test(Watched(), tmp_path, ActivationNoise("residual.*", 0.1, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    clean = outputs[0][0]
    # The input is always the same. Batches 0 and 1 of loader 0, batch 0 of loader 1, and the other seed:
    noises = [x[i] - clean for x in (outputs[0], outputs[1], outputs[3], other[0]) for i in (1, 2)]
    assert all(noise.abs().min() > 0 for noise in noises)
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == len(noises)
    assert all(torch.equal(x[3], clean) for x in outputs)


def test_the_global_random_state_stays(tmp_path):
    torch.manual_seed(5)
    run_test(Watched(), tmp_path)
    plain = torch.rand(1)
    torch.manual_seed(5)
    run_test(Watched(), tmp_path, ActivationNoise("mix", 0.1))
    assert torch.equal(torch.rand(1), plain)


def test_members_get_different_noise_and_repeated_calls_the_same(tmp_path):
    noise = ActivationNoise("residual.0", 0.1)
    outputs, again = (run_test(Watched(members=3), tmp_path, noise) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    noise_S = outputs[0][:, 1] - outputs[0][:, 0]  # for three equal networks
    assert noise_S.shape == (3, 2, 8)
    assert torch.equal(outputs[0][0, 0], outputs[0][1, 0])
    assert len({tuple(noise.flatten().tolist()) for noise in noise_S}) == 3
    ratio_S = noise_S.norm(dim=-1) / outputs[0][:, 0].norm(dim=-1)
    assert ((ratio_S > 0.03) & (ratio_S < 0.25)).all()


def test_noise_changes_only_the_first_element_of_a_tuple(tmp_path):
    (first, *_) = run_test(Watched(), tmp_path, ActivationNoise("pair", 0.1))
    assert not torch.equal(first[3], first[0])


def test_strength_zero_changes_no_bit(tmp_path):
    (first, *_) = run_test(Watched(), tmp_path, ActivationNoise("residual.*", 0.0))
    assert torch.equal(first[1], first[0])


@pytest.mark.parametrize("during", [None, ["fit"], ["validate"], ["test"], ["predict"]])
def test_noise_acts_in_its_stages_only(during, tmp_path):
    module, noise = Watched(), ActivationNoise("residual.*", 0.1, during=during)
    trainer_of(tmp_path, noise, max_steps=3).fit(module, loader(), loader())
    run_test(module, tmp_path, noise)
    trainer_of(tmp_path, noise).predict(module, loader())
    noisy = {name: not all(torch.equal(x[1], x[0]) for x in outputs) for name, outputs in module.outputs.items()}
    stages = during or ["validate", "test", "predict"]
    assert noisy == {
        "train": "fit" in stages,
        "validate": "validate" in stages,
        "sanity_check": "validate" in stages,
        "test": "test" in stages,
        "predict": "predict" in stages,
    }
    clean = run_test(module, tmp_path)  # the hooks are off
    assert all(torch.equal(x[1], x[0]) for x in clean)


def test_noise_differs_between_steps_of_fit(tmp_path):
    module = Watched()
    flags = {"max_steps": 2, "limit_val_batches": 0}
    trainer_of(tmp_path, ActivationNoise("residual.0", 0.1, during=["fit"]), **flags).fit(module, loader())
    first, second = module.outputs["train"]
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_user_errors(tmp_path):
    with pytest.raises(ValueError, match=r"ActivationNoise.strength must be at least 0, not -1"):
        ActivationNoise("residual.*", -1)
    with pytest.raises(ValueError, match="ActivationNoise: `during` names no stage"):
        ActivationNoise("residual.*", 0.1, during=[])
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"ActivationNoise: `seed` must be an integer from 0 .*, got {seed}"):
            ActivationNoise("residual.*", 0.1, seed=seed)
    with pytest.raises(ValueError, match=r"ActivationNoise\.site: no module matches 'residul'; the nearest names are"):
        run_test(Watched(), tmp_path, ActivationNoise("residul", 0.1))


def test_two_callbacks_at_different_sites_add_different_noise():
    class Two(LightningModule):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

    module, trainer = (
        Two(),
        SimpleNamespace(state=SimpleNamespace(stage=RunningStage.TESTING), global_rank=0, global_step=3),
    )
    for site in ("a", "b"):
        noise = ActivationNoise(site, 1.0, relative=False)
        noise.setup(trainer, module, "test")
        noise.on_stage_batch_start(trainer, module, None, 0)
    x = torch.zeros(2, 4)
    assert not torch.equal(module.a(x), module.b(x))


def test_noise_differs_between_steps_epochs_and_ranks_and_is_the_same_again():
    noise, x = ActivationNoise("residual", 1.0), torch.zeros(3)

    def drawn(rank, step):
        stub = SimpleNamespace(state=SimpleNamespace(stage=RunningStage.TRAINING), global_rank=rank, global_step=step)
        noise.on_stage_batch_start(stub, None, None, 0)  # the first batch of an epoch
        return torch.randn(3, generator=noise._generator(x, 0))

    first = drawn(0, 0)
    assert torch.equal(drawn(0, 0), first)
    assert not torch.equal(drawn(0, 1), first)
    assert not torch.equal(drawn(1, 0), first)
