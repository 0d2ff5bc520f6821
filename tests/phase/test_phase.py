"""The phase line: exactly causal with every option, the same step by step, and a memory that is its formula's sum."""

import warnings
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from lightning_modules.core.ensemble import call_members, stack_members
from lightning_modules.phase import Phase
from lightning_modules.phase.angles import Angles
from lightning_modules.phase.mixer import PhaseMixer
from lightning_modules.phase.weights import Decay

VOCAB, LENGTH, WINDOW = 11, 70, 5  # more than a chunk and than a window
SIZES = {"vocab_size": VOCAB, "seq_len": LENGTH, "width": 16, "heads": 2, "seed": 0}
OPTIONS = {
    "single omega": {},
    "notes": {"decay": "none", "normalise": "none", "conv_width": 0, "expansion": 4},
    "window": {"window": WINDOW, "decay": "none"},
    "window of one": {"window": 1, "frequencies": 2, "conv_width": 0},
    "decay of the input": {"decay": "input", "mass": True, "normalise": "mass"},
    "network": {"mlp_width": 24, "expansion": 1},
    "query offset": {"angles": "query_offset"},
    "offsets": {"angles": "offsets", "window": WINDOW, "mass": True},
    "constrained": {"angles": "constrained"},
    "decoupled": {"angles": "decoupled", "normalise": "mass"},
    "frequencies": {"frequencies": 4},
    "all": {"frequencies": 4, "angles": "decoupled", "decay": "input", "mass": True, "expansion": 2, "mlp_width": 24},
    "all in a window": {"frequencies": 4, "angles": "offsets", "decay": "input", "mass": True, "window": WINDOW},
}
CASES = [("PP", name) for name in OPTIONS] + [(pattern, "single omega") for pattern in ("PG", "AP", "L", "GA")]


def make(pattern: str = "PP", **options) -> Phase:
    """Return a module in which no parameter is zero, as after training."""
    module = Phase(**SIZES | {"pattern": pattern} | options).double()
    generator = torch.Generator().manual_seed(options.get("seed") or 0)
    for parameter in module.parameters():
        if (parameter == 0).all():
            parameter.data.normal_(std=0.3, generator=generator)
    return module


def rows(seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("pattern", "name"), CASES)
def test_a_logit_is_causal_and_the_same_step_by_step(pattern, name):
    network, embedded = make(pattern, **OPTIONS[name]).network, []
    hook = network.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits_BTV = network(rows())
    hook.remove()
    window, conv = OPTIONS[name].get("window"), OPTIONS[name].get("conv_width", 4)
    for position in (0, 1, 6, 31, 32, 64):
        gradient_BTD = torch.autograd.grad(logits_BTV[:, position].square().sum(), embedded, retain_graph=True)[0]
        assert (gradient_BTD[:, position + 1 :] == 0).all()
        seen = max(0, position - len(pattern) * (window - 1 + max(conv - 1, 0))) if window else 0
        assert (gradient_BTD[:, seen : position + 1] != 0).any(2).all()
        # Phases from before the window cancel to rounding
        torch.testing.assert_close(gradient_BTD[:, :seen], torch.zeros(2, seen, 16).double(), rtol=0, atol=1e-12)
    state, stepped = network.init_state(2), []
    with torch.no_grad():
        for token_B in rows().unbind(1):
            logits_BV, state = network.step(token_B, state)
            stepped.append(logits_BV)
    torch.testing.assert_close(torch.stack(stepped, 1), logits_BTV, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "frequencies" not in OPTIONS[name]])
def test_a_channel_reads_the_sum_over_pairs_of_positions(name):
    mixer, seen = make("P", **OPTIONS[name]).network.blocks[0].phase, {}
    read_BTD, expected_BTD = watched(mixer, seen), direct(mixer, seen, window=OPTIONS[name].get("window"))
    torch.testing.assert_close(read_BTD, expected_BTD, rtol=0, atol=1e-5)  # the sum of masses has an epsilon


@pytest.mark.parametrize("name", [name for name in OPTIONS if "frequencies" in OPTIONS[name]])
def test_a_head_reads_the_sum_over_pairs_of_positions_and_frequencies(name):
    mixer, seen = make("P", **OPTIONS[name]).network.blocks[0].phase, {}
    read_BTD, expected_BTD = watched(mixer, seen), direct(mixer, seen, window=OPTIONS[name].get("window"))
    torch.testing.assert_close(read_BTD, expected_BTD, rtol=0, atol=1e-10)


def watched(mixer: PhaseMixer, seen: dict[str, Tensor]) -> Tensor:
    """Run the mixer and return what its memory gives; `seen` takes the outputs of all modules."""
    for name, module in mixer.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    mixer(torch.randn(2, LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    return seen["read"]


def direct(mixer: PhaseMixer, seen: dict[str, Tensor], window: int | None) -> Tensor:
    """The formula of `PhaseMixer`, as sums over all pairs of positions, with phases from the plain cumulative sum."""
    omega_BTF, read_BTF, write_BTF = seen["angles"]
    phase_BTF = omega_BTF.cumsum(1)
    reader_BTF, writer_BTF = (phase_BTF if x is None else phase_BTF + x for x in (read_BTF, write_BTF))
    weight_BTSF = (reader_BTF[:, :, None] - writer_BTF[:, None]).cos()
    distance_TS = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    inside_TS1 = ((distance_TS >= 0) & (distance_TS < (window or LENGTH)))[..., None]
    value_BTD, mass_BTG = seen["value"], 1.0 if seen["mass"] is None else seen["mass"]
    log_BTG = torch.zeros(2, LENGTH, 1).double() if seen["decay"] is None else seen["decay"].expand(2, LENGTH, -1)
    total_BTG = log_BTG.cumsum(1)
    share_BTSG = (total_BTG[:, :, None] - total_BTG[:, None]).masked_fill(~inside_TS1, -torch.inf).exp()
    share_BTSG = share_BTSG * (mass_BTG[:, None] if isinstance(mass_BTG, Tensor) else 1)
    if "memory.q_proj" in seen:
        q_BTHK, k_BTHK, v_BTHV = (
            x.unflatten(2, (2, -1)) for x in (seen["memory.q_proj"], seen["memory.k_proj"], value_BTD)
        )
        weight_BTSHK = weight_BTSF.unflatten(3, (2, -1)) * q_BTHK[:, :, None] * k_BTHK[:, None]
        weight_BTSH = weight_BTSHK.sum(4) * q_BTHK.shape[3] ** -0.5 * share_BTSG
        return torch.einsum("btsh,bshv->bthv", weight_BTSH, v_BTHV).flatten(2)
    y_BTD = (weight_BTSF * share_BTSG * value_BTD[:, None]).sum(2)
    return y_BTD / share_BTSG.sum(2) if mixer.memory.normalise else y_BTD


def test_the_reader_of_each_kind_of_angles():
    x_BTD = torch.randn(2, 9, 6).double()
    make_angles = lambda kind: Angles(6, 2, 3, kind).double()  # noqa: E731
    angles = make_angles("constrained")
    omega, read, write = angles(x_BTD, angles.init_state(2))
    turns = (read - (0.1 * angles.offset(x_BTD)).cumsum(1)) / (2 * torch.pi)
    torch.testing.assert_close(turns, turns.round(), rtol=0, atol=1e-9)
    torch.testing.assert_close(omega, angles.omega(x_BTD) + angles.frequency_F)
    assert write is None
    angles = make_angles("decoupled")
    omega, read, write = angles(x_BTD, angles.init_state(2))
    turns = (omega.cumsum(1) + read - (angles.offset(x_BTD) + angles.frequency_F).cumsum(1)) / (2 * torch.pi)
    torch.testing.assert_close(turns, turns.round(), rtol=0, atol=1e-9)
    angles = make_angles("offsets")
    _, read, write = angles(x_BTD, None)
    torch.testing.assert_close((read, write), (angles.offset(x_BTD), angles.key_offset(x_BTD)))


@pytest.mark.parametrize("pattern", ["P", "G", "A"])
def test_a_block_begins_as_the_identity(pattern):
    network = Phase(**SIZES, pattern=pattern, mlp_width=8).network
    x_BTD = torch.randn(2, 9, 16)
    assert torch.equal(network.blocks[0](x_BTD), x_BTD)


@pytest.mark.parametrize("pattern", ["P", "G", "A", "L"])
def test_residual_dropout_zeroes_outputs_of_every_mixer_and_swiglu_in_training_alone(pattern):
    module = make(pattern, mlp_width=8, residual_dropout=0.4, heads=2)
    (block,), seen = module.network.blocks, {}
    for name in (block.site, "mlp", "mid_residual", "residual"):
        block.get_submodule(name).register_forward_hook(lambda module, args, output, n=name: seen.update({n: output}))
    x_BTD = torch.randn(4, 60, 16).double()
    block(x_BTD)
    for before, output, after in ((x_BTD, block.site, "mid_residual"), (seen["mid_residual"], "mlp", "residual")):
        added = seen[after] - before
        assert 0.35 < (added.abs() < 1e-12).double().mean() < 0.45
        kept = added.abs() >= 1e-12
        torch.testing.assert_close(added[kept], seen[output][kept] / 0.6)
    module.eval()
    block(x_BTD)
    torch.testing.assert_close(seen["residual"], x_BTD + seen[block.site] + seen["mlp"])


def test_initial_phases_and_decays_are_spread():
    period_HK = 2 * torch.pi / Angles(16, 4, 8, "single")(torch.zeros(1, 1, 16), None)[0].view(4, 8)
    assert (period_HK.min(1).values < 6.5).all()
    assert (period_HK.max(1).values > 300).all()  # each head has the whole range
    horizon_G = -1 / Decay(16, 12, "learned")(torch.zeros(1, 1, 16))
    torch.testing.assert_close(horizon_G[[0, -1]], torch.tensor([256.0, 4.0]))
    torch.testing.assert_close(-1 / Decay(16, 12, "input")(torch.randn(1, 1, 16))[0, 0], horizon_G)


@pytest.mark.parametrize("name", ["all", "decay of the input", "offsets"])
@pytest.mark.parametrize("pattern", ["P", "GAL"])
def test_an_ensemble_has_the_logits_and_gradients_of_its_members(pattern, name):
    seeds = iter([5, 6])
    stacked = stack_members(lambda: make(pattern, seed=next(seeds), **OPTIONS[name]).network, [5, 6])
    (logits_SBTV,) = call_members(stacked, 2, rows())
    logits_SBTV.square().sum().backward()
    alone = make(pattern, seed=6, **OPTIONS[name]).network
    torch.testing.assert_close(logits_SBTV[1], alone(rows()))
    alone(rows()).square().sum().backward()
    gradients = dict(stacked.named_parameters())
    for parameter, value in alone.named_parameters():
        torch.testing.assert_close(gradients[parameter].grad[1], value.grad)
    deepcopy(stacked)  # as weight averaging does


@pytest.mark.parametrize(("seeds", "flattened"), [([5], [[2, 2, 1, 1]]), ([5, 6], [])])
def test_only_weights_without_members_are_flattened_for_cudnn_on_a_move(monkeypatch, seeds, flattened):
    stacked = stack_members(lambda: make("L").network, seeds)
    seen = []
    # On a GPU PyTorch's method calls cuDNN, which fails on another number of axes
    record = lambda cell: seen.append([weight.dim() for weight in cell._flat_weights])  # noqa: E731
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", record)
    stacked.float()
    assert seen == flattened


def test_phases_stay_in_fp32_under_bf16():
    module, seen = make("P", **OPTIONS["all"]).float(), {}
    expected = module(rows())
    for name in ("angles.advance", "decay.log_decay", "mass.mass"):
        site = module.network.blocks[0].phase.get_submodule(name)
        site.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        logits_BTV = module(rows())
    assert set(seen.values()) == {torch.float32}
    torch.testing.assert_close(logits_BTV.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", OPTIONS)
def test_generation_takes_constant_memory_and_continues_the_row(name):
    module, sizes = make("PG", **OPTIONS[name]), []
    state = module.network.init_state(2)
    for token_B in rows()[:, :8].unbind(1):
        _, state = module.network.step(token_B, state)
        sizes.append(sum(x.numel() for mixer in state.mixers for x in tensors(vars(mixer))))
    assert len(set(sizes)) == 1
    assert torch.equal(module.generate(rows(), 1)[:, 0], module(rows())[:, -1].argmax(1))


def tensors(tree: object) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else []
    return [x for branch in inner for x in tensors(branch)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "PXA"}, "model.pattern .*'X' is none of them"),
        ({"pattern": ""}, "model.pattern .*empty"),
        ({"heads": 3}, "model.heads must divide model.width: 3 does not divide 16"),
        ({"heads": 16, "pattern": "A"}, "model.width / model.heads must be a multiple of 2 for A"),
        ({"heads": 8, "pattern": "G"}, "model.width / model.heads must be a multiple of 4 up to 256 for G"),
        ({"window": 0}, "model.window must be at least 1"),
        ({"expansion": -1}, "model.expansion must be at least 0"),
        ({"dropout": 1.5}, "model.dropout must be at most 1"),
        ({"residual_dropout": 1.5}, "model.residual_dropout must be at most 1"),
        ({"conv_width": 65}, "model.conv_width must be at most 64"),
        ({"frequencies": 2, "normalise": "mass"}, "model.normalise mass belongs to a memory per channel"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(options, message):
    with pytest.raises(UserError, match=message):
        Phase(**SIZES | options)


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (
            {"pattern": "AA", "window": 8, "mass": True},
            ["AA has no P, so these change nothing: model.window, model.mass"],
        ),
        ({"pattern": "PG", "attention_window": 8}, ["PG has no A, so these change nothing: model.attention_window"]),
        ({"pattern": "PA", "window": 8, "attention_window": 8}, []),
        ({"pattern": "GL"}, []),
    ],
)
def test_options_of_a_mixer_that_the_pattern_lacks_are_told(options, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(**options)
    assert [str(warning.message).removeprefix("model.pattern ") for warning in caught] == warned
