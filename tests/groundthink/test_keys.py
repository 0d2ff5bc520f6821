"""Keys of positions, rotary keys, and keys from a bank."""

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.groundthink import GroundThink
from lightning_modules.mixers.key_bank import Bank, KeyBank, RowTokens
from lightning_modules.mixers.keys import KeyPlaces, hashed_keys

MARKERS = [3, 4]
SIZES = {"vocab_size": 12, "seq_len": 40, "width": 16, "window": 5, "seed": 0}


def seen_keys(module: GroundThink, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys of the first block as unit vectors, [B, T, H, K]."""
    _, seen = module.activations(tokens_BT, ["gated_delta.query", "gated_delta.key"])
    query, key = (nn.functional.normalize(x[0], dim=-1) for x in seen.values())
    return query, key


def test_hashed_keys_are_unit_vectors_nearly_at_right_angles_and_depend_on_the_position_alone():
    keys_THK = hashed_keys(torch.arange(300), 2, 64)
    flat_NK = keys_THK.flatten(0, 1)
    cosines_NN = flat_NK @ flat_NK.T - torch.eye(len(flat_NK))
    assert cosines_NN.diagonal().abs().max() < 1e-6
    assert 0.9 < cosines_NN.square().mean() * 64 < 1.1  # as random signs
    assert torch.equal(hashed_keys(torch.arange(100, 300), 2, 64), keys_THK[100:])


def test_rotary_keys_compare_with_queries_by_distance_and_tokens():
    """<q_t, k_s> of two given tokens depends on t - s alone, and does depend on it."""
    module = GroundThink(**SIZES, pattern="G", conv_width=0, rotary_keys=True).double()
    q_THK, k_THK = (x[0] for x in seen_keys(module, torch.full((1, 40), 7)))
    products_HTT = torch.einsum("thk,shk->hts", q_THK, k_THK)
    for distance in (0, 1, 10):
        of_distance = products_HTT.diagonal(-distance, 1, 2)
        torch.testing.assert_close(of_distance, of_distance[:, :1].expand_as(of_distance))
    assert (products_HTT[:, 5, 5] - products_HTT[:, 5, 0]).abs().min() > 1e-3


@pytest.mark.parametrize("ensemble", [1, 2])
def test_what_keys_of_positions_leave_unread_is_not_trained(ensemble: int):
    """DDP waits for the gradient of every parameter that is trained."""
    module = GroundThink(11, 8, width=16, heads=2, seed=0, keys="position", ensemble=ensemble)
    tokens_BT = torch.randint(11, (2, 8))
    module.call(tokens_BT)[0].square().sum().backward()
    names = {name for name, x in module.network.named_parameters() if x.requires_grad and x.grad is None}
    assert not names
    assert not module.network.get_parameter("blocks.0.gated_delta.k_proj.weight").requires_grad


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("options", [{}, {"keys": "both", "rotary_keys": True}, {"keys": "position"}])
def test_the_markers_of_a_row_have_orthonormal_keys_in_turn_and_other_tokens_keep_theirs(learned, options):
    bank = KeyBank(MARKERS[0], len(MARKERS), learned=learned)
    module = GroundThink(**SIZES, pattern="G", key_bank=bank, **options).double()
    plain = GroundThink(**SIZES, pattern="G", **options).double()
    turn = module.network.blocks[0].gated_delta.places.bank.turn
    if learned:
        nn.init.normal_(turn)
    tokens_BT = torch.randint(5, 12, (2, 40))
    places = [[1, 4, 5, 9, 20, 21, 22, 39], [0, 7, 8, 10, 11, 12, 13, 14]]  # K = 8 of them
    for row, places_N in zip(tokens_BT, places, strict=True):
        row[places_N] = torch.tensor(MARKERS * 4)
    keys_BTHK = seen_keys(module, tokens_BT)[1]
    banks = [row[places_N].transpose(0, 1) for row, places_N in zip(keys_BTHK, places, strict=True)]
    torch.testing.assert_close(banks[0], banks[1])  # slots count from the first marker of each row
    torch.testing.assert_close(banks[0] @ banks[0].mT, torch.eye(8).expand(2, 8, 8).double())
    if not learned:
        torch.testing.assert_close(banks[0], torch.eye(8).expand(2, 8, 8).double())
    others_BT = (tokens_BT < MARKERS[0]) | (tokens_BT > MARKERS[-1])
    torch.testing.assert_close(keys_BTHK[others_BT], seen_keys(plain, tokens_BT)[1][others_BT], rtol=0, atol=1e-12)


def test_the_slot_after_the_last_is_the_first_and_counts_go_on_after_a_piece():
    tokens = RowTokens()
    places = KeyPlaces("token", False, Bank(2, 4, KeyBank(1), tokens))
    k_BTHK, tokens_BT = torch.randn(1, 11, 2, 4), torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1]])
    tokens.tokens_BT = tokens_BT
    _, whole, _ = places(k_BTHK, k_BTHK, 0, torch.zeros(1, dtype=torch.long))
    slots = whole[0, :, 0].argmax(1)[tokens_BT[0] == 1]
    assert slots.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    pieces, seen_B = [], torch.zeros(1, dtype=torch.long)
    for first in range(0, 11, 3):
        tokens.tokens_BT, piece = tokens_BT[:, first : first + 3], k_BTHK[:, first : first + 3]
        _, keys, seen_B = places(piece, piece, first, seen_B)
        pieces.append(keys)
    assert torch.equal(torch.cat(pieces, 1), whole)


def test_a_marker_has_its_own_key_by_token_wherever_it_is():
    tokens = RowTokens()
    bank = Bank(2, 4, KeyBank(3, 5, slot="token"), tokens)
    tokens.tokens_BT = torch.tensor([[4, 0, 3, 6, 4, 8, 7, 3]])
    k_BTHK = torch.randn(1, 8, 2, 4)
    keys_BTHK, _ = bank(k_BTHK, torch.zeros(1, dtype=torch.long))
    for head in range(2):
        assert keys_BTHK[0, :, head].argmax(1)[[0, 2, 3, 4, 6, 7]].tolist() == [1, 0, 3, 1, 0, 0]  # 7 - 3 is 4 mod 4
        assert (keys_BTHK[0, [0, 2, 3, 4, 6, 7], head].abs().sum(1) == 1).all()
    assert torch.equal(keys_BTHK[:, [1, 5]], k_BTHK[:, [1, 5]])  # token 8 is behind the last marker


def test_a_bank_stores_as_many_values_as_it_has_keys_without_interference():
    """With beta 1 and no decay, the notes' exact retrieval of K items, through the mixer."""
    module = GroundThink(**SIZES, pattern="G", conv_width=0, key_bank=KeyBank(3)).double()
    mixer = module.network.blocks[0].gated_delta
    mixer.gates.beta.register_forward_hook(lambda module, args, output: torch.ones_like(output))
    mixer.gates.log_decay.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    tokens_BT = torch.full((1, 8), 3)
    values, states = [], []
    mixer.value.register_forward_hook(lambda module, args, output: torch.randn_like(output))
    mixer.value.register_forward_hook(lambda module, args, output: values.append(output))
    mixer.state.register_forward_hook(lambda module, args, output: states.append(output))
    module(tokens_BT)
    torch.testing.assert_close(states[-1][0], values[0][0].transpose(0, 1), rtol=1e-5, atol=1e-5)  # keys are e_n


def test_a_learned_bank_is_trained_and_stays_orthogonal():
    module = GroundThink(**SIZES, pattern="G", conv_width=0, key_bank=KeyBank(3, 2, learned=True)).double()
    bank = module.network.blocks[0].gated_delta.places.bank
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randint(1, 6, (4, 20))).logsumexp(2).square().mean().backward()
        optimizer.step()
    assert bank.turn.abs().max() > 1e-6
    keys_HKK = bank.keys(bank.turn)
    torch.testing.assert_close(keys_HKK @ keys_HKK.mT, torch.eye(8).expand(2, 8, 8).double())
    assert not torch.equal(keys_HKK[0], torch.eye(8).double())
