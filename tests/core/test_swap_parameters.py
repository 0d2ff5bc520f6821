"""A swap puts the right values in place, and restores the parameters bit for bit."""

import pytest
import torch
from torch import nn
from toy_attention import QK, SWAPPED, TOKENS, D, K, Model, assert_equal, orthogonal, rotated, state_of

from lightning_modules.core.swapping import procrustes, swap_parameters


@pytest.mark.parametrize("members", [1, 3])
def test_copy_puts_the_donors_values_in_place_and_restores_the_models(members):
    model, donor = Model(0, members), Model(1, members)
    before, donated = state_of(model), state_of(donor)
    with swap_parameters(model, donated, QK) as names:
        assert names == SWAPPED
        assert_equal(state_of(model), before | {name: donated[name] for name in names})
    assert_equal(state_of(model), before)


@pytest.mark.parametrize("members", [1, 3])
def test_self_swap_changes_no_bit(members):
    module = Model(0, members)
    before, logits = state_of(module), module(TOKENS)
    with swap_parameters(module, before, QK):
        assert_equal(state_of(module), before)
        assert torch.equal(module(TOKENS), logits)


def test_all_members_get_the_parameters_of_a_donor_without_members():
    model, donor = Model(0, 3), Model(1)
    with swap_parameters(model, donor.state_dict(), QK):
        for name in SWAPPED:
            assert all(torch.equal(member, donor.get_parameter(name)) for member in model.get_parameter(name))


def test_parameters_are_restored_after_an_error():
    model = Model(0)
    before = state_of(model)

    def fail():
        with swap_parameters(model, Model(1).state_dict(), QK):
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        fail()
    assert_equal(state_of(model), before)


def test_procrustes_finds_the_rotation():
    donor_VD, rotation_DD = torch.randn(50, D), orthogonal(seed=3)
    found_DD = procrustes(donor_VD, donor_VD @ rotation_DD)
    torch.testing.assert_close(found_DD.float(), rotation_DD, rtol=0, atol=1e-5)
    # For unrelated embeddings the result is orthogonal, and no other rotation brings them closer.
    target_VD = torch.randn(50, D)
    found_DD = procrustes(donor_VD, target_VD).float()
    torch.testing.assert_close(found_DD @ found_DD.T, torch.eye(D), rtol=0, atol=1e-5)
    best = (donor_VD @ found_DD - target_VD).norm()
    assert all((donor_VD @ orthogonal(seed=seed) - target_VD).norm() > best for seed in range(20))


def test_directions_without_embeddings_do_not_rotate():
    rows_VD = torch.randn(2, D - 2, D)
    torch.testing.assert_close(procrustes(rows_VD, rows_VD).float(), torch.eye(D).expand(2, D, D), rtol=0, atol=1e-5)
    rotation_DD = procrustes(rows_VD[0], rows_VD[1]).float()
    torch.testing.assert_close(rotation_DD @ rotation_DD.T, torch.eye(D), rtol=0, atol=1e-5)
    module = nn.Module()
    module.embedding, module.q = nn.Parameter(rows_VD[0]), nn.Parameter(torch.randn(K, D))
    swap = swap_parameters(module, module.state_dict(), "q", "procrustes", "embedding")
    with pytest.warns(UserWarning, match="'embedding' has 4 rows, which leave 2 directions of the stream unal"), swap:
        pass


@pytest.mark.parametrize("members", [1, 3])
def test_parameters_of_a_rotated_copy_fit_after_procrustes(members):
    model = Model(0, members)
    rotation = orthogonal(*[members] * (members > 1))
    donor = rotated(model, rotation)
    logits = model(TOKENS)
    torch.testing.assert_close(donor(TOKENS), logits, rtol=1e-4, atol=1e-4)  # it is the same function
    with swap_parameters(model, donor.state_dict(), QK):
        assert (model(TOKENS) - logits).abs().max() > 0.1
    with swap_parameters(model, donor.state_dict(), QK, "procrustes"):
        torch.testing.assert_close(model(TOKENS), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state_of(model)[SWAPPED[1]], donor.state_dict()[SWAPPED[1]], rtol=0, atol=0)


def test_procrustes_rotates_one_donor_into_the_basis_of_each_member():
    single, rotation = Model(0), orthogonal(3)
    model = Model(1, 3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(rotated(single, rotation[0]).get_parameter(name))
            for member in range(3):
                p[member] = rotated(single, rotation[member]).get_parameter(name)
    with swap_parameters(model, single.state_dict(), QK, "procrustes"):
        torch.testing.assert_close(model(TOKENS), single(TOKENS).expand(3, -1, -1, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("members", [1, 2])
def test_random_has_the_mean_and_deviation_of_the_parameter(members):
    module = nn.Module()
    module.ensemble = members
    module.q = nn.Parameter(torch.randn(members, 100, 100) * 0.1 + 3 if members > 1 else torch.randn(100, 100) + 3)
    with torch.no_grad():
        module.q[-1] *= 5
    before = module.q.detach().clone()
    with swap_parameters(module, None, "q", "random"):
        first = module.q.detach().clone()
    with swap_parameters(module, None, "q", "random"):
        assert torch.equal(module.q, first)
    with swap_parameters(module, None, "q", "random", seed=1):
        assert not torch.equal(module.q, first)
    for drawn, original in zip(first.view(members, -1), before.view(members, -1), strict=True):
        torch.testing.assert_close(drawn.std(), original.std(), rtol=0.05, atol=0)
        torch.testing.assert_close(drawn.mean(), original.mean(), rtol=0.05, atol=0)
        assert torch.corrcoef(torch.stack([drawn, original]))[0, 1].abs() < 0.05
    assert torch.equal(module.q, before)


def test_a_donor_that_does_not_fit_is_an_error_and_changes_nothing():
    model, donated = Model(0), state_of(Model(1))
    before = state_of(model)
    unfitting = {
        "has no parameter 'network.attn.k_proj.bias'; the nearest names are: 'network.attn.": {
            name: value for name, value in donated.items() if "k_proj.bias" not in name
        },
        r"'network.attn.q_proj.weight' does not fit: its shape is \(4, 5\), the model's \(4, 6\)": donated
        | {SWAPPED[0]: torch.zeros(K, D - 1)},
        r"its shape is \(6,\), the model's \(4, 6\)": donated | {SWAPPED[0]: torch.zeros(D)},
    }
    for message, state in unfitting.items():
        with pytest.raises(ValueError, match=message), swap_parameters(model, state, QK):
            pass
    with pytest.raises(ValueError, match="No parameter matches 'qq'"), swap_parameters(model, donated, "qq"):
        pass
    narrow = Model(0)
    narrow.network.attn.q_proj = nn.Linear(D + 1, K)
    swap = swap_parameters(narrow, state_of(narrow), QK, "procrustes")
    with pytest.raises(ValueError, match=r"of shape \(4, 7\) does not read from a residual stream of 6"), swap:
        pass
    for basis in ("*.attn.*.weight", "*.q_proj.bias"):
        swap = swap_parameters(model, donated, QK, "procrustes", basis)
        with pytest.raises(ValueError, match=r"`basis` must be one matrix of token embeddings \[V, D\]"), swap:
            pass
    assert_equal(state_of(model), before)
