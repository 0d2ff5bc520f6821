"""A swap puts in exactly what it says, and takes it out again bit for bit."""

import pytest
import torch
from torch import nn
from toy_attention import QK, SWAPPED, TOKENS, D, K, Model, assert_equal, orthogonal, state_of, turned

from callbacks.parameter_swap import procrustes, swap_parameters


@pytest.mark.parametrize("members", [1, 3])
def test_copy_is_the_donors_inside_and_the_own_after(members):
    own, donor = Model(0, members), Model(1, members)
    before, donated = state_of(own), state_of(donor)
    with swap_parameters(own, donated, QK) as names:
        assert names == SWAPPED
        assert_equal(state_of(own), before | {name: donated[name] for name in names})
    assert_equal(state_of(own), before)


@pytest.mark.parametrize("members", [1, 3])
def test_self_swap_changes_no_bit(members):
    module = Model(0, members)
    before, logits = state_of(module), module(TOKENS)
    with swap_parameters(module, before, QK):
        assert_equal(state_of(module), before)
        assert torch.equal(module(TOKENS), logits)


def test_a_donor_without_members_is_given_to_all():
    own, donor = Model(0, 3), Model(1)
    with swap_parameters(own, donor.state_dict(), QK):
        for name in SWAPPED:
            assert all(torch.equal(member, donor.get_parameter(name)) for member in own.get_parameter(name))


def test_own_parameters_come_back_after_an_error():
    own = Model(0)
    before = state_of(own)

    def fail():
        with swap_parameters(own, Model(1).state_dict(), QK):
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        fail()
    assert_equal(state_of(own), before)


def test_the_rotation_is_found():
    donor_VD, rotation_DD = torch.randn(50, D), orthogonal(seed=3)
    found_DD = procrustes(donor_VD, donor_VD @ rotation_DD)
    torch.testing.assert_close(found_DD.float(), rotation_DD, rtol=0, atol=1e-5)
    # Of two unrelated sets of embeddings it is orthogonal, and no other rotation brings them closer.
    own_VD = torch.randn(50, D)
    found_DD = procrustes(donor_VD, own_VD).float()
    torch.testing.assert_close(found_DD @ found_DD.T, torch.eye(D), rtol=0, atol=1e-5)
    best = (donor_VD @ found_DD - own_VD).norm()
    assert all((donor_VD @ orthogonal(seed=seed) - own_VD).norm() > best for seed in range(20))


def test_directions_without_embeddings_stay():
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
def test_parameters_of_a_turned_copy_fit_after_procrustes(members):
    own = Model(0, members)
    rotation = orthogonal(*[members] * (members > 1))
    donor = turned(own, rotation)
    logits = own(TOKENS)
    torch.testing.assert_close(donor(TOKENS), logits, rtol=1e-4, atol=1e-4)  # it is the same function
    with swap_parameters(own, donor.state_dict(), QK):
        assert (own(TOKENS) - logits).abs().max() > 0.1
    with swap_parameters(own, donor.state_dict(), QK, "procrustes"):
        torch.testing.assert_close(own(TOKENS), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state_of(own)[SWAPPED[1]], donor.state_dict()[SWAPPED[1]], rtol=0, atol=0)


def test_procrustes_of_one_donor_turns_it_into_the_basis_of_each_member():
    single, rotation = Model(0), orthogonal(3)
    own = Model(1, 3)
    with torch.no_grad():
        for name, p in own.named_parameters():
            p.copy_(turned(single, rotation[0]).get_parameter(name))
            for member in range(3):
                p[member] = turned(single, rotation[member]).get_parameter(name)
    with swap_parameters(own, single.state_dict(), QK, "procrustes"):
        torch.testing.assert_close(own(TOKENS), single(TOKENS).expand(3, -1, -1, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("members", [1, 2])
def test_random_has_mean_and_deviation_of_the_own(members):
    module = nn.Module()
    module.ensemble = members
    module.q = nn.Parameter(torch.randn(members, 100, 100) * 0.1 + 3 if members > 1 else torch.randn(100, 100) + 3)
    with torch.no_grad():
        module.q[-1] *= 5
    own = module.q.detach().clone()
    with swap_parameters(module, None, "q", "random"):
        first = module.q.detach().clone()
    with swap_parameters(module, None, "q", "random"):
        assert torch.equal(module.q, first)
    with swap_parameters(module, None, "q", "random", seed=1):
        assert not torch.equal(module.q, first)
    for drawn, kept in zip(first.view(members, -1), own.view(members, -1), strict=True):
        torch.testing.assert_close(drawn.std(), kept.std(), rtol=0.05, atol=0)
        torch.testing.assert_close(drawn.mean(), kept.mean(), rtol=0.05, atol=0)
        assert torch.corrcoef(torch.stack([drawn, kept]))[0, 1].abs() < 0.05
    assert torch.equal(module.q, own)


def test_what_does_not_fit_is_told_and_changes_nothing():
    own, donated = Model(0), state_of(Model(1))
    before = state_of(own)
    unfitting = {
        "has no parameter 'network.attn.k_proj.bias'; the nearest names are: 'network.attn.": {
            name: value for name, value in donated.items() if "k_proj.bias" not in name
        },
        r"'network.attn.q_proj.weight' does not fit: its shape is \(4, 5\), the model's \(4, 6\)": donated
        | {SWAPPED[0]: torch.zeros(K, D - 1)},
        r"its shape is \(6,\), the model's \(4, 6\)": donated | {SWAPPED[0]: torch.zeros(D)},
    }
    for message, state in unfitting.items():
        with pytest.raises(ValueError, match=message), swap_parameters(own, state, QK):
            pass
    with pytest.raises(ValueError, match="No parameter matches 'qq'"), swap_parameters(own, donated, "qq"):
        pass
    narrow = Model(0)
    narrow.network.attn.q_proj = nn.Linear(D + 1, K)
    swap = swap_parameters(narrow, state_of(narrow), QK, "procrustes")
    with pytest.raises(ValueError, match=r"of shape \(4, 7\) does not read from a residual stream of 6"), swap:
        pass
    for basis in ("*.attn.*.weight", "*.q_proj.bias"):
        swap = swap_parameters(own, donated, QK, "procrustes", basis)
        with pytest.raises(ValueError, match=r"`basis` must be one matrix of token embeddings \[V, D\]"), swap:
            pass
    assert_equal(state_of(own), before)
