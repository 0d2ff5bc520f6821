"""The hybrid: exactly causal with every pattern and option, the same step by step, and its parts do what they say."""

from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from callbacks.activation_clamp import ActivationClamp
from datamodules.errors import UserError
from datamodules.needle_gym import NeedleGym
from lightning_modules.core.ensemble import call_members, stack_members
from lightning_modules.groundthink import GroundThink
from lightning_modules.groundthink.penalties import KeyPenalty, Penalty
from lightning_modules.mixers.gates import Gates
from lightning_modules.mixers.key_bank import KeyBank

VOCAB, LENGTH = 11, 130  # more than a chunk of the kernel, and so long that window attention reads blocks
SIZES = {"vocab_size": VOCAB, "seq_len": LENGTH, "width": 16, "window": 5, "seed": 0}
OPTIONS = {
    "plain": {},
    "widths": {"key_width": 4, "value_width": 12, "conv_width": 3, "mlp_width": 0},
    "no convolution": {"conv_width": 0},
    "reflections": {"allow_negative_eigenvalues": True, "gates": "seed"},
    "shifted value": {"shifted_value": True, "key_conv_width": 2},
    "position keys": {"keys": "position"},
    "rotary keys": {"rotary_keys": True},
    "key bank": {"key_bank": KeyBank(1, markers=3, slot="token"), "conv_width": 0},
    "all": {
        "keys": "both",
        "rotary_keys": True,
        "key_bank": KeyBank(1, markers=3, learned=True),
        "shifted_value": True,
        "key_conv_width": 6,
        "window_reads_state": True,
        "allow_negative_eigenvalues": True,
        "tie_embeddings": True,
    },
}
CASES = [(pattern, "plain") for pattern in ("G", "S", "SG", "GGS")] + [("GSGS", name) for name in OPTIONS]


def make(pattern: str = "GS", **options) -> GroundThink:
    module = GroundThink(**SIZES, pattern=pattern, **options).double()
    for name, value in module.named_parameters():
        if name.endswith("turn"):  # zero at first: a bank that has not learned yet
            nn.init.normal_(value, generator=torch.Generator().manual_seed(1))
    return module


def rows() -> Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("pattern", "name"), CASES)
def test_a_logit_is_causal_and_the_same_step_by_step(pattern, name):
    module, embedded = make(pattern, **OPTIONS[name]), []
    network, tokens_BT = module.network, rows()
    hook = network.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits_BTV = network(tokens_BT)
    hook.remove()
    for position in (0, 1, 6, 63, 64):
        gradient_BTD = torch.autograd.grad(logits_BTV[:, position].square().sum(), embedded, retain_graph=True)[0]
        assert (gradient_BTD[:, position + 1 :] == 0).all()
        seen = 0 if "G" in pattern else max(0, position - SIZES["window"] + 1)
        assert (gradient_BTD[:, seen : position + 1] != 0).any(2).all()
        assert (gradient_BTD[:, :seen] == 0).all()
    for position in (1, 30):  # what comes from tokens without a gradient
        changed_BT = tokens_BT.clone()
        changed_BT[:, position + 1 :] = 2
        assert torch.equal(network(changed_BT)[:, : position + 1], logits_BTV[:, : position + 1])
    state, stepped = network.init_state(2), []
    with torch.no_grad():
        for token_B in tokens_BT.unbind(1):
            logits_BV, state = network.step(token_B, state)
            stepped.append(logits_BV)
    torch.testing.assert_close(torch.stack(stepped, 1), logits_BTV, rtol=0, atol=1e-10)


def test_generation_takes_constant_memory():
    network, sizes = make(**OPTIONS["all"]).network, []
    state = network.init_state(2)
    for token_B in rows()[:, :20].unbind(1):
        _, state = network.step(token_B, state)
        values = [value for mixer in state.mixers for value in vars(mixer).values()]
        sizes.append(sum(value.numel() for value in values if isinstance(value, Tensor)))
    assert len(set(sizes[SIZES["window"] :])) == 1


def test_generation_continues_the_row():
    module = make()
    assert torch.equal(module.generate(rows(), 1)[:, 0], module(rows())[:, -1].argmax(1))


def test_a_zeroed_state_leaves_nothing_to_read_and_the_sites_change_nothing_by_themselves():
    module = make("GS", **OPTIONS["all"])
    mixer, attention = module.network.blocks[0].gated_delta, module.network.blocks[1].window_attention
    expected, states, patterns = module(rows()), [], []
    mixer.state.register_forward_hook(lambda module, args, output: states.append(output))
    attention.pattern.register_forward_hook(lambda module, args, output: patterns.append(output))
    torch.testing.assert_close(module(rows()), expected, rtol=0, atol=1e-10)
    assert len(states) == 2 * LENGTH  # the mixer reads, then window attention does
    assert states[0].shape == (2, 2, 8, 8)
    torch.testing.assert_close(patterns[0].sum(3), torch.ones(2, 2, LENGTH).double())
    assert (patterns[0] > 0).sum(3).max() == SIZES["window"]
    mixer.state.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    outputs = []
    mixer.register_forward_hook(lambda module, args, output: outputs.append(output))
    assert (module(rows()) - expected).abs().max() > 1e-3
    assert (outputs[0] == 0).all()


def test_callbacks_act_on_every_site_of_the_delta_rule():
    """A clamp to zero at one site, in a test of the module, with one member and with two."""
    data = NeedleGym(needles=2, seq_len=16, vocab_size=VOCAB, batch_size=2, test_size=8)
    for ensemble in (1, 2):
        module = GroundThink(**SIZES | {"width": 8}, pattern="GS", ensemble=ensemble)
        losses = {}
        for site in ("", "query", "key", "value", "read", "gates.beta", "gates.log_decay", "state"):
            clamp = [ActivationClamp(f"gated_delta.{site}", "zero", during=["test"])] if site else []
            trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=clamp)
            losses[site] = trainer.test(module, data, verbose=False)[0]["test/loss"]
        silent = losses["state"]
        assert all(losses[site] == pytest.approx(silent) for site in ("query", "value", "read", "gates.beta"))
        assert len({round(losses[site], 9) for site in ("", "state", "gates.log_decay")}) == 3


def test_a_shifted_value_is_written_under_the_key_and_beta_of_the_position_before():
    mixer, seen = make("G", shifted_value=True).network.blocks[0].gated_delta, {}
    for name, module in mixer.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    mixer(torch.randn(3, 2, 16, dtype=torch.float64))
    k_BHK = nn.functional.normalize(seen["key"][:, 0], dim=-1)
    v_BHV = seen["v_conv"][0][:, 1].unflatten(1, (2, 8))
    written_BHKV = seen["gates.beta"][:, 0, :, None, None] * k_BHK[..., None] * v_BHV[..., None, :]
    torch.testing.assert_close(seen["state"], written_BHKV, rtol=1e-4, atol=1e-6)  # the norm has an epsilon


def test_attention_leaves_out_cudnn():
    torch.backends.cuda.enable_cudnn_sdp(True)
    make()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_initial_gates():
    gates, x = Gates(16, 2, "seed", 1.0), torch.zeros(1, 1, 16)
    torch.testing.assert_close(gates(x)[0].exp(), torch.full((1, 1, 2), 2.0).sigmoid())
    torch.testing.assert_close(gates(x)[1], torch.full((1, 1, 2), -2.0).sigmoid())
    log_decay_BTH, beta_BTH = Gates(16, 64, "spread", 2.0)(x)
    assert -0.1 <= log_decay_BTH.min() < -0.09
    assert -0.0011 < log_decay_BTH.max() <= -0.001
    assert (beta_BTH == 1).all()


def test_an_ensemble_has_the_logits_and_gradients_of_its_members():
    options = OPTIONS["all"] | {"pattern": "GS"}
    turns = torch.randn(2, 2, 8, 8, dtype=torch.float64)

    def network() -> nn.Module:
        return GroundThink(**SIZES | {"seed": None}, **options).double().network

    def turn(network: nn.Module, value: Tensor) -> None:
        network.blocks[0].gated_delta.places.bank.turn.data.copy_(value)

    stacked = stack_members(network, [5, 6])
    assert stacked.unembed.weight is stacked.token_embedding.weight
    turn(stacked, turns)
    (logits_SBTV,) = call_members(stacked, 2, rows())
    logits_SBTV.square().sum().backward()
    alone = GroundThink(**SIZES | {"seed": 6}, **options).double().network
    turn(alone, turns[1])
    torch.testing.assert_close(logits_SBTV[1], alone(rows()))
    alone(rows()).square().sum().backward()
    gradients = dict(stacked.named_parameters())
    for name, value in alone.named_parameters():
        torch.testing.assert_close(gradients[name].grad[1], value.grad)
    deepcopy(stacked)  # as weight averaging does: no tensor of a forward is left behind


def test_gates_and_state_stay_in_fp32_under_bf16():
    module, seen = make("GS", **OPTIONS["all"]).float(), {}
    expected = module(rows())
    for name in ("state", "gates.log_decay", "gates.beta", "read"):
        site = module.network.blocks[0].gated_delta.get_submodule(name)
        site.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        logits_BTV = module(rows())
    assert {name: seen[name] for name in ("state", "gates.log_decay", "gates.beta")} == dict.fromkeys(
        ("state", "gates.log_decay", "gates.beta"), torch.float32
    )
    torch.testing.assert_close(logits_BTV.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "GXS"}, "model.pattern .*'X' is neither"),
        ({"pattern": ""}, "model.pattern .*empty"),
        ({"heads": 3}, "model.heads must divide model.width: 3 does not divide 16"),
        ({"heads": 16}, "model.width / model.heads must be even"),
        ({"key_width": 0}, "model.key_width must be at least 4, not 0"),
        ({"key_width": 6}, "model.key_width must be a multiple of 4, such as 8, not 6"),
        ({"value_width": 260}, "model.value_width must be at most 256"),
        ({"conv_width": -1}, "model.conv_width must be at least 0"),
        ({"pattern": "SG", "window_reads_state": True}, "model.window_reads_state needs an S behind a G"),
        ({"rotary_keys": True, "keys": "position"}, "model.rotary_keys needs keys of tokens"),
        ({"key_conv_width": 9, "keys": "position"}, "model.key_conv_width needs keys of tokens"),
        ({"key_orthogonality": KeyPenalty(1.0), "keys": "position"}, "model.key_orthogonality needs keys of tokens"),
        ({"pattern": "S", "rotary_keys": True}, "model.rotary_keys needs a G in model.pattern, which is S"),
        ({"pattern": "S", "key_bank": KeyBank(1)}, "model.key_bank needs a G"),
        ({"pattern": "S", "beta_sparsity": Penalty(0.1)}, "model.beta_sparsity needs a G"),
        ({"key_conv_width": 0, "keys": "position"}, "model.key_conv_width needs keys of tokens"),
        ({"pattern": "S", "key_conv_width": 0}, "model.key_conv_width needs a G"),
        ({"pattern": "S", "keys": "position"}, "model.keys needs a G"),
        ({"pattern": "S", "gates": "seed"}, "model.gates needs a G"),
        ({"pattern": "S", "shifted_value": True}, "model.shifted_value needs a G"),
        ({"pattern": "S", "allow_negative_eigenvalues": True}, "model.allow_negative_eigenvalues needs a G"),
        ({"pattern": "S", "value_width": 8}, "model.value_width needs a G"),
        ({"key_bank": KeyBank(-1)}, "model.key_bank.first_marker must be at least 0, not -1"),
        ({"key_bank": KeyBank(9, 3)}, "model.key_bank: 3 markers from token 9 on are more than the 11 tokens"),
        ({"key_bank": KeyBank(9, 0)}, "model.key_bank.markers must be at least 1, not 0"),
        ({"key_orthogonality": KeyPenalty(-1.0)}, "model.key_orthogonality.weight must be at least 0"),
        ({"beta_sparsity": Penalty(1.0, from_step=-1)}, "model.beta_sparsity.from_step must be at least 0"),
        ({"beta_sparsity": Penalty(1.0, from_accuracy=1.5)}, "model.beta_sparsity.from_accuracy must be at most 1"),
        ({"piece_len": 0}, "model.piece_len must be at least 1"),
        ({"reproduce_flaws": True}, "model.reproduce_flaws: final_state needs model.window_reads_state"),
        (
            {"reproduce_flaws": ["final_state"], "window_reads_state": True, "piece_len": 4},
            "model.piece_len: a row cannot be read in pieces with model.reproduce_flaws final_state",
        ),
    ],
)
def test_a_mistake_is_told_in_a_sentence(options, message):
    with pytest.raises(UserError, match=message):
        GroundThink(**SIZES | options)


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"pattern": "GG"}, "no S, so these change nothing: model.window"),
        ({"pattern": "S", "conv_width": 2}, "no G, so"),
    ],
)
def test_options_of_a_mixer_that_the_pattern_lacks_are_told(options, warned):
    with pytest.warns(UserWarning, match=warned):
        GroundThink(**SIZES | options)


def test_window_attention_alone_takes_heads_that_the_delta_rule_does_not():
    assert GroundThink(**SIZES | {"width": 12}, pattern="SS")(rows()).shape == (2, LENGTH, VOCAB)
