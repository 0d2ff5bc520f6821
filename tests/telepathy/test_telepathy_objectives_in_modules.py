"""Objectives in a module: over ranks and padding, in training, and those that cannot be."""

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from lightning_modules.telepathy import FlowBridge, PerceiverBridge, TokenBridge
from lightning_modules.telepathy import objectives as objective

FLOW = partial(FlowBridge, width=16, heads=2, steps=2)
FIFTEEN = {name: 1.0 for name in objective.OBJECTIVES} | {"first_tokens": {"weight": 1.0, "k": 3, "text": "question"}}


def step_of(module, problems) -> objective.BridgeStep:
    torch.manual_seed(5)  # of the number that flow bridges draw
    batch = module.collate(problems, True)
    encoding = module.encode(batch)
    logits_NV = module.target.logits(batch["soft"], encoding.soft_BKD)
    parts = module.target, module.bridge, module.bottleneck, encoding, logits_NV, module.scale
    return objective.BridgeStep(batch, *parts, lambda x: x, module.heads, module.flaws)


def on_one_rank(module, problems) -> dict[str, float]:
    losses = objective.weighted(module.objectives, step_of(module, problems), lambda count: 1.0)
    return {name: loss.item() for name, loss in losses.items()}


def on_two_ranks(module, problems) -> dict[str, float]:
    """Every objective as two ranks compute it, each with half of the problems: the mean of both."""
    middle = len(problems) // 2
    steps, means = [step_of(module, half) for half in (problems[:middle], problems[middle:])], {}
    for name, one in module.objectives.items():
        sent = []
        for step in steps:
            sent.append([])
            step.gather = partial(record, sent[-1])
            one.loss(step)
        values, masses = [], []
        for step in steps:
            step.gather = partial(next_of, iter([torch.cat(pair) for pair in zip(*sent, strict=True)]))
            values.append(one.loss(step).item())
            masses.append(1.0 if one.mass is None else float(one.mass(step)))
        means[name] = sum(value * mass for value, mass in zip(values, masses, strict=True)) / sum(masses)
    return means


def record(sent: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    sent.append(x)
    return x


def next_of(received: Iterator[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return next(received)


FLAWED = ["mean_pool", "own_head", "pooled_variance", "anchor_scale", "self_contrast", "constant_anchor", "flow_scale"]


@pytest.mark.parametrize(
    ("bridge", "bottleneck", "left_out", "flaws"),
    [
        (FLOW, "vq", (), []),
        (partial(PerceiverBridge, soft_tokens=9, heads=2, width=16), "fsq", ("flow", "commitment"), []),
        (partial(TokenBridge, hidden=16), "none", ("flow", "commitment", "code_entropy"), []),
        (FLOW, "none", ("commitment", "code_entropy"), FLAWED),
    ],
)
def test_every_objective_is_the_same_on_two_ranks_and_with_other_padding(
    telepathy, problems, bridge, bottleneck, left_out, flaws
):
    objectives = {name: setting for name, setting in FIFTEEN.items() if name not in left_out}
    module = telepathy(bridge, bottleneck=bottleneck, objectives=objectives, reproduce_flaws=flaws)
    problems = sorted(problems, key=lambda problem: len(problem.question))  # the halves have different padding
    one, two = on_one_rank(module, problems), on_two_ranks(module, problems)
    assert one.keys() == set(objectives)
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=2e-4, abs=1e-5), name


@pytest.mark.parametrize("name", ["anchor", "reconstruction", "bag_of_words", "autoencode", "readback", "flow"])
def test_each_new_objective_falls_when_it_is_trained(telepathy, problems, name):
    module = telepathy(FLOW, objectives={name: 1.0}, output="none")
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    first = None
    for _ in range(8):
        (loss,) = objective.weighted(module.objectives, step_of(module, problems[:8]), lambda count: 1.0).values()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.97 * first


def test_what_the_target_is_asked_to_repeat(telepathy, problems):
    module = telepathy(objectives={"autoencode": 1.0, "readback": 1.0})
    batch, tokenizer = module.collate(problems[:1], True), module.target.tokenizer
    question, answer = problems[0].question, problems[0].answer
    assert tokenizer.decode(batch["readback"].labels_N[:-1]) == f" {question}"
    assert tokenizer.decode(batch["autoencode"].labels_N[:-1]) == f" {question}\nAnswer: {answer}"
    for rows in ("autoencode", "readback"):
        hole = int((batch[rows].column_BT[0] >= 0).nonzero()[-1])
        assert tokenizer.decode(batch[rows].tokens_BT[0, hole + 1 :]).startswith(f"\nRepeat: {question[:20]}")


def test_reconstruction_cannot_be_had_from_a_constant_unless_means_are_compared(telepathy, problems):
    losses = {}
    for flaws in ([], ["mean_pool"]):
        module = telepathy(objectives={"reconstruction": {"distance": "cosine"}}, reproduce_flaws=flaws)
        step = step_of(module, problems)
        step.encoding.soft_BKD = torch.ones_like(step.soft_BKD) * step.batch["soft_mask"][..., None]
        optimizer = torch.optim.Adam(module.heads.parameters(), lr=0.03)
        for _ in range(60):
            loss = module.objectives["reconstruction"].loss(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[bool(flaws)] = loss.item()
    assert losses[True] < 0.2 < 0.4 < losses[False]


def test_an_anchor_in_squares_at_the_scale_of_small_embeddings_has_hardly_a_gradient(telepathy, problems):
    grads = {}
    for flaws in ([], ["anchor_scale"]):
        module = telepathy(objectives={"anchor": {"distance": "mse"}}, reproduce_flaws=flaws)
        module.objectives["anchor"].loss(step_of(module, problems)).backward()
        grads[bool(flaws)] = module.soft_tokens.scale.grad.item()
    assert grads[False] == pytest.approx(grads[True] / module.scale**2, rel=1e-3)


def test_a_variance_without_gradient_trains_nothing(telepathy, problems):
    bridge = partial(PerceiverBridge, soft_tokens=9, heads=2, width=16)
    for flaws in ([], ["dead_diversity"]):
        module = telepathy(bridge, objectives={"lm": 1.0, "position_variance": 1.0}, reproduce_flaws=flaws)
        assert module.objectives["position_variance"].loss(step_of(module, problems)).requires_grad == (not flaws)


def test_self_contrast_does_not_know_the_text(telepathy, problems):
    values = {}
    for flaws in ([], ["self_contrast"]):
        module = telepathy(objectives={"contrastive": 1.0}, reproduce_flaws=flaws)
        step = step_of(module, problems)
        own = module.objectives["contrastive"].loss(step).item()
        step.batch["question"] = step.batch["question"].flip(0)
        values[bool(flaws)] = own, module.objectives["contrastive"].loss(step).item()
    assert values[True][0] == values[True][1]
    assert values[False][0] != values[False][1]


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"lm": {"weight": -1.0}}, "model.objectives.lm must be at least 0"),
        ({"anchor": {"of": "answer"}}, "model.objectives.anchor has no 'of': choose among weight, text, distance"),
        ({"anchor": {"text": "reply"}}, "model.objectives.anchor.text has no 'reply': choose among question, answer"),
        ({"first_tokens": {"k": 2.5}}, "model.objectives.first_tokens.k must be a number of type int, not 2.5"),
        ({"first_tokens": {"k": math.inf}}, "model.objectives.first_tokens.k must be a number of type int, not inf"),
        ({"lm": {"weight": "much"}}, "model.objectives.lm.weight must be a number of type float, not 'much'"),
        ({"first_tokens": {"k": 0}}, "model.objectives.first_tokens.k must be at least 1, not 0"),
        ({"separation": {"margin": "far"}}, "model.objectives.separation.margin must be a number of type float"),
        ({"lm": 1.0, "code_entropy": 0.1}, "model.objectives.code_entropy needs codes: set model.bottleneck to vq or"),
        ({"lm": 1.0, "commitment": 0.1}, "model.objectives.commitment needs a codebook: set model.bottleneck to vq"),
        ({"first_tokens": {"factor": 0}}, "model.objectives.first_tokens.factor must be at least 1e-06, not 0"),
        ({"flow": 1.0}, "model.objectives.flow needs a FlowBridge as model.bridge, not a TokenBridge"),
    ],
)
def test_objectives_that_cannot_be(telepathy, objectives, message):
    with pytest.raises(ValueError, match=message):
        telepathy(objectives=objectives)


@pytest.mark.parametrize(
    ("flaw", "options", "needed"),
    [
        ("own_head", {}, "the objective bag_of_words in model.objectives"),
        ("codebook_scale", {"bottleneck": "fsq"}, "model.bottleneck vq"),
        ("untrained_output", {"bottleneck": "vq"}, "model.bottleneck none"),
    ],
)
def test_a_flaw_of_a_part_that_is_not_there(telepathy, flaw, options, needed):
    with pytest.raises(ValueError, match=f"model.reproduce_flaws: {flaw} needs {needed}"):
        telepathy(reproduce_flaws=[flaw], **options)


def test_a_flaw_that_leaves_no_gradient_is_refused(telepathy):
    with pytest.raises(ValueError, match="dead_diversity leaves position_variance no gradient: add an objective"):
        telepathy(objectives={"position_variance": 1.0, "lm": 0.0}, reproduce_flaws=["dead_diversity"])
