"""Rows in pieces give the logits of whole rows; the notes' read of the final state leaks, and cannot be cut."""

import pytest
import torch
from lightning.pytorch import Trainer
from test_groundthink import OPTIONS, SIZES, make, rows
from torch import Tensor

from callbacks.activation_clamp import ActivationClamp
from datamodules.errors import UserError
from datamodules.needle_gym import NeedleGym
from lightning_modules.groundthink import GroundThink

LEAK = {"window_reads_state": True, "reproduce_flaws": ["final_state"]}


@pytest.mark.parametrize("name", OPTIONS)
def test_pieces_have_the_logits_and_the_gradient_of_the_whole_row(name):
    module, tokens_BT = make("GSGS", **OPTIONS[name]), rows()
    expected = module(tokens_BT)
    logits, state, first = [], None, 0
    for length in (1, 2, 33, 3, 1, 90):
        piece_BTV, state = module.read(tokens_BT[:, first : first + length], state)
        logits.append(piece_BTV)
        first += length
    assert first == tokens_BT.shape[1]
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-10)
    weight = module.network.blocks[0].gated_delta.v_proj.weight
    for_pieces, for_whole = (torch.autograd.grad(x[:, -1].sum(), weight)[0] for x in (logits[-1], expected))
    torch.testing.assert_close(for_pieces, for_whole, rtol=1e-8, atol=1e-12)


def test_a_state_of_one_call_continues_in_generation():
    module, tokens_BT = make(**OPTIONS["all"]), rows()
    _, state = module.read(tokens_BT[:, :-1])
    logits_BV, _ = module.network.step(tokens_BT[:, -1], state)
    torch.testing.assert_close(logits_BV, module(tokens_BT)[:, -1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("ensemble", [1, 2])
def test_evaluation_in_pieces_has_the_measures_of_whole_rows_and_training_reads_whole_rows(ensemble):
    data = NeedleGym(needles=2, seq_len=16, vocab_size=11, batch_size=2, validation_size=8, test_size=8)
    options = OPTIONS["all"] | {"ensemble": ensemble}
    whole, cut = (GroundThink(**SIZES, pattern="GSGS", piece_len=length, **options) for length in (None, 3))
    lengths: list[int] = []
    for block in cut.network.blocks:
        block.mixer.extend = spy(block.mixer.extend, lengths)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    for run in (trainer.validate, trainer.test):
        expected, figures = (run(module, data, verbose=False)[0] for module in (whole, cut))
        assert figures == pytest.approx(expected, abs=1e-6)
        assert set(lengths) == {3, 1}
    lengths.clear()
    clamp = ActivationClamp("gated_delta.read", "identity")
    hooked = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[clamp])
    assert hooked.test(cut, data, verbose=False)[0] == pytest.approx(expected, abs=1e-6)
    assert set(lengths) == {16}
    lengths.clear()
    cut.train().losses(torch.randint(11, (2, 16)), torch.randint(11, (2, 16)))
    assert set(lengths) == {16}


def spy(extend, lengths: list[int]):
    def noted(x_BTD: Tensor, state):
        lengths.append(x_BTD.shape[1])
        return extend(x_BTD, state)

    return noted


def test_an_ensemble_carries_no_state_between_calls():
    with pytest.raises(UserError, match="an ensemble cannot carry a state between calls"):
        GroundThink(**SIZES, ensemble=2).read(rows())


def test_a_piece_has_tokens():
    with pytest.raises(UserError, match="a piece has no tokens"):
        make().read(rows()[:, :0])


@pytest.mark.parametrize("pattern", ["GS", "GSGS"])
def test_the_final_state_leaks_later_tokens_and_the_causal_read_does_not(pattern):
    """The logit of a position has a gradient at later positions: the model reads what it has to predict."""
    for options, leaks in ((LEAK, True), ({"window_reads_state": True}, False), ({}, False)):
        network, embedded = make(pattern, **options).network, []
        network.embedding.register_forward_hook(lambda module, args, output, kept=embedded: kept.append(output))
        logits_BTV = network(rows())
        gradient_BTD = torch.autograd.grad(logits_BTV[:, 20].square().sum(), embedded)[0]
        later_BT = (gradient_BTD[:, 21:] != 0).any(2)
        assert later_BT.all() if leaks else not later_BT.any()


def test_the_final_state_is_what_the_last_position_has_written():
    """The last position reads the same with and without the flaw."""
    leaky, causal = make("GS", **LEAK), make("GS", window_reads_state=True)
    torch.testing.assert_close(leaky(rows())[:, -1], causal(rows())[:, -1], rtol=0, atol=1e-10)
    assert (leaky(rows())[:, 0] - causal(rows())[:, 0]).abs().max() > 1e-3


def test_a_leaky_model_does_not_generate():
    module = make("GS", **LEAK)
    for use in (lambda: module.generate(rows(), 1), lambda: module.read(rows())):
        with pytest.raises(UserError, match="final_state each position reads the state after the last one"):
            use()
