"""The bare memory: its states are those of the rule, its measures are right, and its keys are what they claim."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

import main as cli
from datamodules.errors import UserError
from datamodules.memory_items import MemoryItems
from lightning_modules.groundthink.mechanism import DeltaMemory
from lightning_modules.groundthink.mechanism.item_keys import OF_CONTEXT, make_keys
from lightning_modules.groundthink.mechanism.memory_measures import GradientError, MemoryMeasures, measure
from lightning_modules.mixers.keys import hashed_keys

DATA = {"items": 12, "key_width": 8, "value_width": 12, "test_size": 5, "eval_batch_size": 2, "seed": 3}


def items(**changes):
    data = MemoryItems(**DATA | changes)
    return data.draw(np.arange(data.test_size))


def keys_of(kind, strength=0.0, spacing=1, **changes):
    batch = items(**changes)
    return make_keys(kind, batch, batch["context_SBNWK"], strength, spacing)


def naive_states(k, v, beta, decay, rule):
    """The notes' loop in NumPy, for one row: the state after each write."""
    state, states = np.zeros((k.shape[1], v.shape[1])), []
    for key, value in zip(k.astype(float), v.astype(float), strict=True):
        error = value - key @ (state if rule == "seed" else decay * state)
        state = decay * state + beta * np.outer(key, error)
        states.append(state)
    return states


@pytest.mark.parametrize(
    ("beta", "decay", "rule"), [(1.0, 1.0, "standard"), (0.4, 0.9, "standard"), (0.4, 0.9, "seed")]
)
def test_states_are_those_of_the_rule(beta, decay, rule):
    memory = DeltaMemory(beta=beta, decay=decay, rule=rule, read_after=[7, 1, 12])
    batch = items()
    key = make_keys("token", batch, batch["context_SBNWK"], 0.0, 1)
    found = memory.states(key, batch["value_SBNV"])
    for row in range(5):
        expected = naive_states(key[0, row].numpy(), batch["value_SBNV"][0, row].numpy(), beta, decay, rule)
        for state, count in zip(found, [1, 7, 12], strict=True):
            np.testing.assert_allclose(state[0, row].numpy(), expected[count - 1], rtol=1e-4, atol=1e-5)


def test_measures_by_hand():
    key = torch.tensor([[[[1.0, 0.0], [0.6, 0.8]]]])
    value = torch.tensor([[[[2.0, 0.0], [0.0, 1.0]]]])
    state = torch.tensor([[[[0.0, 3.0], [0.0, 0.0]]]])
    read = key @ state  # [0, 3] and [0, 1.8]
    means, (hits, first_hit, soft_hits) = measure(state, read, key, key, value)
    error, first, last, similarity, first_similarity, last_similarity, between, norm, soft = (x.item() for x in means)
    assert first == pytest.approx(math.sqrt(4 + 9) / 2)
    assert last == pytest.approx(0.8)
    assert error == pytest.approx((first + last) / 2)
    assert (first_similarity, last_similarity, similarity) == pytest.approx((0.0, 1.0, 0.5))
    assert (hits.item(), first_hit.item(), soft_hits.item()) == (1, 0, 2)
    assert between == pytest.approx(0.6)
    assert norm == pytest.approx(3.0)
    weight = 1 / (1 + math.exp(0.6 - 1))
    blend = [weight * 3 + (1 - weight) * 1.8, (1 - weight) * 3 + weight * 1.8]
    assert soft == pytest.approx((math.hypot(2, blend[0]) / 2 + abs(blend[1] - 1)) / 2)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_no_exact_gradient(wrong):
    error, exact = GradientError(2, 3), torch.ones(2, 4, 5)
    broken = exact.clone()
    broken[1, 0, 0] = wrong
    nothing = torch.zeros_like(exact)  # as the gradient by a gate that changes nothing
    error.update([exact, broken, nothing], [exact.double(), exact.double(), nothing.double()])
    assert error.compute()[0] == 0
    assert not error.compute()[1].isfinite()
    error.reset()
    error.update([exact, exact, exact], [exact.double(), exact.double(), nothing.double()])
    assert not error.compute().isfinite().any()


def test_a_memory_that_has_diverged_has_no_recall_and_equal_keys_are_not_told_apart():
    memory = DeltaMemory("marker", beta=2.0, decay=0.88, rule="seed", read_after=[900])
    batch = items(items=900)
    key = memory.make_keys(batch, batch["context_SBNWK"])
    (state,) = memory.states(key, batch["value_SBNV"])
    measures = MemoryMeasures(1, [900])
    measures.update([(state, key @ state)], key, key, batch["value_SBNV"])
    means, shares = measures.compute()
    assert not means["error_at_900"].isfinite()
    assert shares["recall_at_900"][0].isnan()
    assert shares["first_recall_at_900"][0].isnan()
    equal = torch.ones(1, 2, 4, 4) / 2  # keys of four items, and their values and the state
    assert (measure(equal, equal, equal, equal, equal)[1][2] == 0).all()


def test_measures_do_not_depend_on_the_batch_size():
    batch = items()
    key, value = make_keys("token", batch, batch["context_SBNWK"], 0.0, 1), batch["value_SBNV"]
    memory = DeltaMemory(read_after=[3, 12])
    states = memory.states(key, value)
    found = []
    for size in (1, 2, 5):
        measures = MemoryMeasures(1, [3, 12])
        for start in range(0, 5, size):
            part = slice(start, start + size)
            few = [
                (state[:, part], key[:, part, :n] @ state[:, part]) for n, state in zip([3, 12], states, strict=True)
            ]
            measures.update(few, key[:, part], key[:, part], value[:, part])
        found.append(measures.compute())
    for means, shares in found[1:]:
        assert {name: x.item() for name, x in means.items()} == pytest.approx(
            {name: x.item() for name, x in found[0][0].items()}
        )
        assert shares == found[0][1]
    assert found[0][1]["recall_at_12"][1] == 60
    assert found[0][1]["first_recall_at_12"][1] == 5


def test_a_member_is_a_run_with_its_seed():
    class Two:
        ensemble = 2

    both = MemoryItems(**DATA)
    type(both)._module, kept = property(lambda self: Two), type(both)._module
    try:
        together = both.draw(np.arange(5))
    finally:
        type(both)._module = kept
    for member in range(2):
        alone = items(seed=3 + member)
        assert all(torch.equal(together[name][member], alone[name][0]) for name in alone)
    parts = [MemoryItems(**DATA).draw(np.arange(*bounds)) for bounds in ((0, 2), (2, 5))]
    for name, whole in items().items():
        assert torch.equal(torch.cat([part[name] for part in parts], 1), whole)


@pytest.mark.parametrize("kind", ["token", "marker", "orthogonal", "hashed", "rotary", *OF_CONTEXT])
def test_keys_are_unit_vectors(kind):
    torch.testing.assert_close(keys_of(kind).norm(dim=-1), torch.ones(1, 5, 12))


def test_keys_are_what_they_claim():
    marker, bank = keys_of("marker"), keys_of("orthogonal")
    assert torch.equal(marker, marker[:, :, :1].expand_as(marker))
    assert torch.allclose(bank[:, :, :8] @ bank[:, :, :8].mT, torch.eye(8), atol=1e-5)
    assert torch.equal(bank[:, :, 8:], bank[:, :, :4])
    batch = items()
    positions = batch["first_SB"][0, 2] + 3 * torch.arange(12)
    assert torch.allclose(keys_of("hashed", spacing=3)[0, 2], hashed_keys(positions, 1, 8)[:, 0])
    same = keys_of("alike", 1.0)
    assert torch.allclose(same, same[:, :, :1].expand_as(same), atol=1e-6)
    assert torch.allclose(keys_of("alike", 0.0), bank, atol=1e-6)
    # RoPE: the cosine depends on the distance alone
    turned = keys_of("rotary", spacing=16)
    between = cosine_similarity(turned[:, :, 1:], turned[:, :, :-1], dim=-1)
    assert torch.allclose(between, between[:, :, :1].expand_as(between), atol=1e-4)
    assert not torch.allclose(between, torch.ones_like(between), atol=0.1)


def test_sinusoids_are_those_of_the_notes():
    batch, strength = items(), 0.5
    key = make_keys("sinusoidal", batch, batch["context_SBNWK"], strength, 1)
    marker = normalize(batch["context_SBNWK"][0, 1, 0, -1], dim=0)
    for place in (0, 5):
        sines = torch.zeros(8)
        for j in range(4):
            frequency = 1.0 / 10000 ** (2 * j / 8)
            sines[2 * j], sines[2 * j + 1] = math.sin(place * frequency), math.cos(place * frequency)
        torch.testing.assert_close(key[0, 1, place], normalize(marker + strength * sines, dim=0))


def test_convolved_keys_differ_where_the_context_does():
    batch = items(context=3)
    context = batch["context_SBNWK"].clone()
    context[..., :-1, :] = context[:, :, :1, :-1]  # the same two tokens before each item
    for kind, equal in (("context", False), ("marker_context", True), ("short_convolution", True)):
        key = make_keys(kind, batch, context, 0.0, 1)
        assert torch.allclose(key, key[:, :, :1].expand_as(key)) is equal
        assert not torch.allclose(keys_of(kind, context=3)[:, :, 0], keys_of(kind, context=3)[:, :, 1], atol=0.1)


RUN = ["test", "--config", "configs/delta_mechanism.yaml", "--data.items", "16", "--model.read_after", "[4,16]"]
RUN += ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]


def metrics(*options):
    trainer = cli.main([*RUN, *options]).trainer
    return {name.removeprefix("test/"): value.item() for name, value in trainer.callback_metrics.items()}


def test_a_test_measures_the_memory(workplace):
    found = metrics("--model.check_gradients", "true", "--model.decay", "0.9")
    assert 0 < found["gradient_error"] < 1e-4
    assert found["last_error_at_16"] < 1e-5 < found["error_at_4"] < found["first_error_at_16"]
    orthogonal = metrics("--model.keys", "orthogonal")
    assert orthogonal["error_at_16"] < 1e-5
    assert orthogonal["recall_at_16"] == 1
    repeated = metrics("--model.repeat", "true")
    assert repeated["state_norm_at_16"] == pytest.approx(repeated["state_norm_at_4"], rel=1e-5)
    single = ["--data.items", "1", "--model.read_after", "[1]", "--model.beta", "0.5", "--model.corrections", "2"]
    assert metrics(*single)["error_at_1"] == pytest.approx(1 - 0.5 * (1 + 0.5 * 0.5 + 0.5 * (1 - 0.5 * 1.25)))
    noisy = metrics("--model.query_noise", "0.5")
    assert noisy["last_error_at_16"] > 0.1
    similar = ("--model.keys", "alike", "--model.strength", "0.3", "--model.read_after", "null")
    plain, corrected = metrics(*similar), metrics(*similar, "--model.corrections", "20")
    assert corrected["error_at_16"] < 0.5 * plain["error_at_16"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model.keys", "hashed", "--model.query_noise", "0.1"], "model.query_noise is for the keys token, context"),
        (["--model.strength", "0.1"], "model.strength is for the keys alike, sinusoidal, not for 'token'"),
        (["--model.spacing", "2"], "model.spacing is for the keys hashed, sinusoidal, rotary, not for 'token'"),
        (["--model.beta", "2.5"], "model.beta must be at most 2, not 2.5"),
        (["--model.decay", "0"], "model.decay must be positive, not 0"),
        (["--trainer.precision", "bf16-true"], "trainer.precision: bf16-true rounds"),
        (["--data.key_width", "10"], "data.key_width must be a multiple of 4, such as 8, not 10"),
        (["--model.read_after", "[17]"], "model.read_after has 17, and data.items is 16"),
        (["--model.read_after", "[0]"], "model.read_after[0] must be at least 1, not 0"),
        (
            ["--model", "GroundThink", "--model.vocab_size", "8", "--model.seq_len", "8"],
            "data: MemoryItems gives items of a memory, which GroundThink does not read",
        ),
        (["--data", "NeedleGym"], "data: DeltaMemory reads MemoryItems, not NeedleGym"),
    ],
)
def test_mistakes_are_sentences(workplace, capsys, options, sentence):
    with pytest.raises(SystemExit) as ended:
        cli.main([*RUN, *options])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_there_is_nothing_to_train(workplace, capsys, command):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *RUN[1:]])
    assert ended.value.code == 2
    assert "run `python main.py test`" in capsys.readouterr().err
    with pytest.raises(UserError, match="only a test set"):
        MemoryItems().train_dataloader()
