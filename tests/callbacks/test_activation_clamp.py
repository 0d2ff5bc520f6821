"""Clamps set their statistic, and change nothing else."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import RunningStage
from safetensors.torch import save_file
from torch import nn
from toy_classifier import Classifier, loader, trainer, within_class_spread

from callbacks.activation_clamp import ActivationClamp, clamp_mean_radius, clamp_radius, clamp_spread
from datamodules.errors import UserError
from lightning_modules.core.ensemble import call_members, stack_members

REFERENCE = {"radius": 3.0, "spread.target": 0.7, "spread.batch": 2.5}


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "reference.safetensors"
    sites = ("residual", "pair")
    save_file({f"{site}.{key}": torch.tensor(value) for site in sites for key, value in REFERENCE.items()}, path)
    return str(path)


# The formulas


def test_clamp_radius_sets_the_norm_at_every_position():
    x = torch.randn(4, 50, 16) * torch.rand(4, 50, 1).mul(5).exp()
    x[0, 0] = 0
    clamped = clamp_radius(x, 2.5)
    assert torch.equal(clamped[0, 0], x[0, 0])
    norms = clamped.flatten(0, 1)[1:].norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 2.5), rtol=1e-5, atol=0)
    cosine = nn.functional.cosine_similarity(clamped, x, dim=-1).flatten()[1:]
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_clamp_mean_radius_sets_the_mean_norm_by_one_factor():
    x = torch.randn(4, 50, 16) * torch.rand(4, 50, 1).mul(5).exp()
    x[0, 0] = 0
    clamped = clamp_mean_radius(x, 2.5)
    torch.testing.assert_close(clamped.norm(dim=-1).mean(), torch.tensor(2.5), rtol=1e-5, atol=0)
    torch.testing.assert_close(clamped, x * (2.5 / x.norm(dim=-1).mean()))
    assert torch.equal(clamp_mean_radius(torch.zeros(3, 4), 2.5), torch.zeros(3, 4))


def test_clamp_spread_sets_the_spread_and_keeps_class_means():
    x = torch.randn(4, 50, 16) * 3 + 1
    labels = torch.randint(100, 107, (4, 50))
    labels[:, ::3] = -100
    clamped = clamp_spread(x, labels, 0.4)
    torch.testing.assert_close(within_class_spread(clamped, labels), torch.tensor(0.4).double(), rtol=1e-5, atol=0)
    assert torch.equal(clamped[labels == -100], x[labels == -100])
    for c in range(100, 107):
        torch.testing.assert_close(clamped[labels == c].mean(0), x[labels == c].mean(0), rtol=1e-5, atol=1e-5)


def test_clamp_spread_keeps_classes_of_one_position():
    x = torch.randn(6, 8, requires_grad=True)
    clamped = clamp_spread(x, torch.arange(6), 2.0)
    assert torch.equal(clamped, x)
    clamped.sum().backward()
    assert x.grad.isfinite().all()


def test_gradients_match_the_formulas():
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 4, 4, 4, -100, 2])
    assert torch.autograd.gradcheck(lambda x: clamp_spread(x, labels, 0.5), x)
    assert torch.autograd.gradcheck(lambda x: clamp_radius(x, 0.5), x)


# The callback


@pytest.mark.parametrize("checkpointed", [False, True])
def test_identity_changes_no_bit(checkpointed, tmp_path):
    plain, clamped = Classifier(checkpointed), Classifier(checkpointed)
    trainer(tmp_path).fit(plain, loader(), loader())
    trainer(tmp_path, ActivationClamp("*", "identity")).fit(clamped, loader(), loader())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, clamped.get_parameter(name)), name
    for (_, x), (_, y) in zip(plain.outputs, clamped.outputs, strict=True):
        assert torch.equal(x, y)


def test_identity_returns_the_same_tensor(tmp_path):
    module = Classifier()
    clamp = ActivationClamp("mix", "identity")
    clamp.setup(trainer(tmp_path), module, "fit")
    outputs = []
    module.mix.register_forward_hook(lambda module, args, output: outputs.append(output))
    assert module.mix(torch.randn(2, 8)) is outputs[0]


@pytest.mark.parametrize("site", ["residual", "pair"])
def test_naive_sets_the_radius_in_every_stage(site, tmp_path, reference):
    module = Classifier()
    run = trainer(tmp_path, ActivationClamp(site, "naive", reference))
    run.fit(module, loader(), loader())
    run.test(module, loader(), verbose=False)
    assert {stage for stage, _ in module.outputs} == {"train", "validate", "test"}
    for _, x in module.outputs:
        torch.testing.assert_close(x.norm(dim=-1), torch.full(x.shape[:2], 3.0), rtol=1e-5, atol=0)


def test_naive_over_the_batch_keeps_the_ratios_of_norms(tmp_path, reference):
    module = Classifier()
    clamp = ActivationClamp("residual", "naive", reference, classes="batch")
    trainer(tmp_path, clamp).test(module, loader(), verbose=False)
    for (_, x), original in zip(module.outputs, module.inputs, strict=True):
        torch.testing.assert_close(x, original * (3.0 / original.norm(dim=-1).mean()))


@pytest.mark.parametrize("classes", ["target", "batch"])
def test_mean_preserving_sets_the_spread_of_labelled_positions(classes, tmp_path, reference):
    module = Classifier()
    trainer(tmp_path, ActivationClamp("residual", "mean_preserving", reference, classes=classes)).test(
        module, loader(), verbose=False
    )
    target = torch.tensor(REFERENCE[f"spread.{classes}"]).double()
    for batch, (_, x), original in zip(loader(), module.outputs, module.inputs, strict=True):
        labels = batch["labels"] if classes == "target" else batch["labels"].clamp(max=0)
        torch.testing.assert_close(within_class_spread(x, labels), target, rtol=1e-5, atol=0)
        assert torch.equal(x[labels == -100], original[labels == -100])
        assert not torch.isclose(x[labels != -100], original[labels != -100]).all()


@pytest.mark.parametrize("site", ["residual", "pair"])
def test_modes_that_remove_the_input(site, tmp_path):
    def outputs_and_inputs(mode):
        module = Classifier()
        trainer(tmp_path, ActivationClamp(site, mode)).test(module, loader(), verbose=False)
        return zip((x for _, x in module.outputs), module.inputs, strict=True)

    for x, original in outputs_and_inputs("zero"):
        assert not x.any()
        assert original.any()
    for x, original in outputs_and_inputs("mean"):
        torch.testing.assert_close(x, torch.stack([original.sum(0) / len(original)] * len(original)))
    for x, original in outputs_and_inputs("shuffle"):
        assert torch.equal(x[0], original[-1])
        assert torch.equal(x[1:], original[:-1])


@pytest.mark.parametrize("mode", ["mean", "shuffle"])
def test_a_batch_of_one_row_has_no_other_row_and_a_warning_says_so(mode, tmp_path):
    module = Classifier()
    with pytest.warns(UserWarning, match=rf"ActivationClamp\(mode='{mode}'\) changes nothing in a batch of one row"):
        trainer(tmp_path, ActivationClamp("residual", mode)).test(module, loader(1), verbose=False)


def test_random_direction_moves_as_far_as_naive_elsewhere(tmp_path, reference):
    module = Classifier()
    trainer(tmp_path, ActivationClamp("residual", "random_direction", reference)).test(module, loader(), verbose=False)
    moves = []
    for (_, x), original in zip(module.outputs, module.inputs, strict=True):
        moves.append(x - original)
        naive = clamp_radius(original, 3.0) - original
        torch.testing.assert_close(moves[-1].norm(dim=-1), naive.norm(dim=-1), rtol=1e-4, atol=1e-5)
        assert nn.functional.cosine_similarity(moves[-1], naive, dim=-1).abs().mean() < 0.6
    directions = [nn.functional.normalize(move, dim=-1) for move in moves]
    assert not any(torch.allclose(a, b, atol=0.1) for a, b in pairwise(directions))


@pytest.mark.parametrize("mode", ["naive", "mean_preserving", "random_direction"])
def test_training_is_the_same_with_activation_checkpointing(mode, tmp_path, reference):
    modules = [Classifier(checkpointed=False), Classifier(checkpointed=True)]
    for module in modules:
        trainer(tmp_path, ActivationClamp("residual", mode, reference)).fit(module, loader(), loader())
        assert module.embed.weight.grad.abs().sum() > 0
    for parameter, other in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=0)


def test_clamp_acts_in_its_stages_only_and_its_hooks_come_off(tmp_path):
    module = Classifier()
    run = trainer(tmp_path, ActivationClamp("residual", "zero", during=["validate"]))
    run.fit(module, loader(), loader())
    run.test(module, loader(), verbose=False)
    zero = {stage: not x.any() for stage, x in module.outputs}
    assert zero == {"train": False, "validate": True, "test": False}
    assert not module.residual._forward_hooks


def test_hooks_come_off_when_a_run_fails(tmp_path, reference):
    module = Classifier()
    clamp = ActivationClamp("residual", "mean_preserving", reference, labels="targets")
    with pytest.raises(ValueError, match=r"'targets' of shape \(12, 6\)"):
        trainer(tmp_path, clamp).fit(module, loader())
    assert not module.residual._forward_hooks


def test_generation_during_training_is_not_clamped_by_class(tmp_path, reference):
    class Generating(Classifier):
        def on_train_batch_end(self, *_):
            self.eval()
            self.generated = self(torch.zeros(2, 3, dtype=torch.long))
            self.train()

    module = Generating()
    trainer(tmp_path, ActivationClamp("residual", "mean_preserving", reference)).fit(module, loader())
    assert torch.equal(module.outputs[-1][1], module.inputs[-1])


def test_user_errors(tmp_path, reference):
    with pytest.raises(ValueError, match="needs `reference`"):
        ActivationClamp("residual", "naive")
    with pytest.raises(ValueError, match="ActivationClamp: `during` names no stage"):
        ActivationClamp("residual", "zero", during=[])
    with pytest.raises(UserError, match="ActivationReference"):
        trainer(tmp_path, ActivationClamp("residual", "naive", "missing.safetensors")).fit(Classifier(), loader())
    with pytest.raises(ValueError, match=r"'residul'.*'residual'"):
        trainer(tmp_path, ActivationClamp("residul", "naive", reference)).fit(Classifier(), loader())
    with pytest.raises(ValueError, match=r"'final_norm.radius'.*'residual.radius'"):
        trainer(tmp_path, ActivationClamp("final_norm", "naive", reference)).fit(Classifier(), loader())
    with pytest.raises(ValueError, match="ActivationClamp: `seed` must be an integer from 0"):
        ActivationClamp("residual", "random_direction", reference, seed=-1)
    (tmp_path / "damaged.safetensors").write_bytes(b"no header")
    damaged = ActivationClamp("residual", "naive", str(tmp_path / "damaged.safetensors"))
    with pytest.raises(UserError, match=r"damaged.safetensors' cannot be read as a safetensors file"):
        trainer(tmp_path, damaged).fit(Classifier(), loader())
    with pytest.warns(UserWarning, match="ignores `reference`"):
        ActivationClamp("residual", "zero", reference)


def test_members_with_data_of_their_own_have_their_own_classes(tmp_path, reference):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.residual = nn.Embedding(7, 4), nn.Identity()

        def forward(self, tokens):
            return self.residual(self.embed(tokens))

    network, module = stack_members(Network, [0, 1]), Classifier()
    network.residual = module.residual
    clamp = ActivationClamp("residual", "mean_preserving", reference)
    tokens_SBT, labels_SBT = torch.randint(7, (2, 5, 6)), torch.randint(3, (2, 5, 6))
    stub = SimpleNamespace(state=SimpleNamespace(stage=RunningStage.TRAINING), predicting=False)
    stub.global_rank = stub.global_step = 0
    plain_SBTD = call_members(network, 2, tokens_SBT, labels_SBT)[0]
    clamp.setup(stub, module, "fit")
    clamp.on_stage_batch_start(stub, module, {"labels": labels_SBT}, 0)
    clamped_SBTD = call_members(network, 2, tokens_SBT, labels_SBT)[0]
    for x, plain, labels in zip(clamped_SBTD, plain_SBTD, labels_SBT, strict=True):
        torch.testing.assert_close(x, clamp_spread(plain, labels, REFERENCE["spread.target"]))


def test_two_clamps_have_different_state_keys():
    assert ActivationClamp("mix", "zero").state_key != ActivationClamp("residual", "zero").state_key
