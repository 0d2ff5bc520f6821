"""The measures of the separability line against cases worked by hand, and against a loop over positions."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity, one_hot

from lightning_modules.core.losses import member_losses
from lightning_modules.separability.measures import Separation, position_overlap

EXACT = {"rtol": 1e-12, "atol": 1e-12}
MEASURES = {
    "accuracy", "margin", "loss", "a_act", "a_projection", "sigma2", "a_signal", "anchor_cosine", "anchor_cosine2"
}  # fmt: skip


def measure(logits, x, labels, unembed=None, anchor=None) -> dict[str, float]:
    """One member's measures; the unembedding is the identity if left out."""
    unembed = torch.eye(logits.shape[-1], x.shape[-1]) if unembed is None else unembed
    separation = Separation(1, logits.shape[-1], x.shape[-1])
    cosine = None if anchor is None else cosine_similarity(x, anchor, dim=2)[None]
    separation.update(logits[None], x[None], labels, unembed[None], cosine)
    measured, hits, count = separation.compute()
    assert count == (labels != -100).sum()
    if count:
        assert hits["accuracy"] / count == measured["accuracy"]
    return {name: values_S.item() for name, values_S in measured.items()}


def classes_on_axes(amplitude: float, spread: float, classes: int = 3) -> dict[str, float]:
    """Class c has its mean at amplitude e_c, and positions at +spread and -spread from it on an axis of its own."""
    labels = torch.arange(classes).repeat(2)
    x_ND = amplitude * one_hot(labels, 2 * classes).float()
    x_ND[torch.arange(2 * classes), classes + labels] = torch.tensor([1.0, -1.0]).repeat_interleave(classes) * spread
    return measure(x_ND[None, :, :classes], x_ND[None], labels[None])


def batch(seed: int, members: int = 2, rows: int = 6) -> dict[str, torch.Tensor]:
    """Random logits, streams, unembeddings and anchors of a batch, some positions of which have no label."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (rows, 4), generator=random)
    labels[torch.rand(rows, 4, generator=random) < 0.3] = -100
    shapes = {"logits": (members, rows, 4, 5), "x": (members, rows, 4, 7), "anchor": (members, rows, 4, 7)}
    made = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return made | {"labels": labels}


def by_loop(logits, x, anchor, labels, unembed) -> dict[str, float]:
    """The measures of one member as their definitions read, position by position in fp64."""
    sums, streams = dict.fromkeys(MEASURES - {"sigma2", "a_signal"}, 0.0), {}
    for place in (labels != -100).nonzero().tolist():
        z, h, other = (values[tuple(place)].double() for values in (logits, x, anchor))
        y = labels[tuple(place)].item()
        rival = max((token for token in range(len(z)) if token != y), key=lambda token: z[token])
        direction = (unembed[y] - unembed[rival]).double()
        sums["accuracy"] += float(z.argmax() == y)
        sums["margin"] += float(z[y] - z[rival])
        sums["loss"] -= math.log(z[y].exp() / z.exp().sum())
        sums["a_act"] += math.sqrt(sum(value**2 for value in h.tolist()))
        sums["a_projection"] += float(h @ direction / (direction @ direction).sqrt())
        cosine = float(h @ other / (h @ h).sqrt() / (other @ other).sqrt())
        sums["anchor_cosine"] += cosine
        sums["anchor_cosine2"] += cosine**2
        streams.setdefault(y, []).append(h)
    n = sum(map(len, streams.values()))
    means = {y: sum(found) / len(found) for y, found in streams.items()}
    within = sum(float((h - means[y]) @ (h - means[y])) for y, found in streams.items() for h in found)
    signal = sum(len(found) * float(means[y].norm()) for y, found in streams.items())
    both = {"sigma2": within / (n - len(streams)), "a_signal": signal / n}
    return {name: value / n for name, value in sums.items()} | both


@pytest.mark.parametrize(("amplitude", "spread"), [(3.0, 1.0), (6.0, 1.0), (3.0, 2.0), (3.0, 0.0), (0.0, 1.0)])
def test_amplitude_and_variance_of_known_classes(amplitude, spread):
    """Six positions, three classes: sigma2 = 6 spread^2 / (6 - 3), whatever the amplitude; a_signal the reverse."""
    measured = classes_on_axes(amplitude, spread)
    assert measured["sigma2"] == pytest.approx(2 * spread**2, abs=1e-12)
    assert measured["a_signal"] == pytest.approx(amplitude)
    assert measured["a_act"] == pytest.approx(math.hypot(amplitude, spread))


def test_a_class_weighs_as_many_positions_as_it_has():
    """Three positions of a class at 1, 2 and 3 and one of another at 10: means 2 and 10, squares 1 + 0 + 1 and 0."""
    x_ND = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 10.0]])
    measured = measure(x_ND[None], x_ND[None], torch.tensor([[0, 0, 0, 1]]))
    assert measured["a_signal"] == pytest.approx((3 * 2 + 10) / 4)
    assert measured["sigma2"] == pytest.approx(2 / (4 - 2))
    assert measured["a_act"] == pytest.approx((1 + 2 + 3 + 10) / 4)


def test_margin_accuracy_and_loss_of_known_logits():
    """Two right answers by 2 and by 1, one wrong by 4; a position without a label counts for nothing."""
    logits = torch.tensor([[[5.0, 3.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 5.0], [0.0, 0.0, 99.0]]])
    labels = torch.tensor([[0, 1, 0, -100]])
    measured = measure(logits, torch.ones(1, 4, 2), labels)
    assert measured["accuracy"] == pytest.approx(2 / 3)
    assert measured["margin"] == pytest.approx((2 + 1 - 4) / 3)
    losses = [math.log(1 + math.exp(-2) + math.exp(-5)), math.log(1 + 2 * math.exp(-1))]
    losses += [math.log(1 + math.exp(-1) + math.exp(4))]
    assert measured["loss"] == pytest.approx(sum(losses) / 3)


def test_the_loss_of_even_logits_is_that_of_chance():
    measured = measure(torch.zeros(2, 3, 8), torch.ones(2, 3, 8), torch.full((2, 3), 5))
    assert measured["loss"] == pytest.approx(math.log(8))


def test_the_projection_is_on_the_difference_from_the_best_other_token():
    """W[0] - W[1] = (3, 4), of length 5: the stream (1, 1) has 7 / 5 along it, whatever the third token's row is."""
    unembed = torch.tensor([[3.0, 5.0], [0.0, 1.0], [70.0, -20.0]])
    logits = torch.tensor([[[9.0, 8.0, 7.0]]])
    for length in (1.0, 10.0):
        measured = measure(logits, length * torch.ones(1, 1, 2), torch.tensor([[0]]), unembed)
        assert measured["a_projection"] == pytest.approx(length * 7 / 5)
    longer = measure(logits, torch.ones(1, 1, 2), torch.tensor([[0]]), 10 * unembed)
    assert longer["a_projection"] == pytest.approx(7 / 5)  # the unembedding's own length is left out


@pytest.mark.parametrize(
    ("angles", "cosine", "cosine2"),
    [((0, 0), 1, 1), ((90, 90), 0, 0), ((180, 180), -1, 1), ((60, 60), 0.5, 0.25), ((60, 120), 0, 0.25)],
)
def test_the_cosine_with_an_anchor_at_known_angles(angles, cosine, cosine2):
    turned = torch.tensor(angles).deg2rad()
    x, anchor = torch.tensor([2.0, 0.0]).expand(1, 2, 2), 5 * torch.stack([turned.cos(), turned.sin()], 1)[None]
    measured = measure(torch.zeros(1, 2, 2), x, torch.tensor([[0, 1]]), anchor=anchor)
    assert measured["anchor_cosine"] == pytest.approx(cosine, abs=1e-6)
    assert measured["anchor_cosine2"] == pytest.approx(cosine2, abs=1e-6)
    assert "anchor_cosine" not in measure(torch.zeros(1, 2, 2), x, torch.tensor([[0, 1]]))


def test_every_measure_is_what_a_loop_finds_over_two_batches_as_over_one():
    first, second = batch(1), batch(2)
    whole = {name: torch.cat([first[name], second[name]], -2 if name == "labels" else 1) for name in first}
    unembed = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3))
    kinds = {"together": [first, second], "whole": [whole]}
    found = {}
    for kind, batches in kinds.items():
        separation = Separation(2, 5, 7)
        for one in batches:
            separation.update(
                one["logits"], one["x"], one["labels"], unembed, cosine_similarity(one["x"], one["anchor"], dim=3)
            )
        found[kind], _, _ = separation.compute()
        assert found[kind].keys() == MEASURES
    for name in MEASURES:
        torch.testing.assert_close(found["together"][name], found["whole"][name], **EXACT)
    for member in range(2):
        own = {name: whole[name] if name == "labels" else whole[name][member] for name in whole}
        alone = measure(**own, unembed=unembed[member])
        expected = by_loop(**own, unembed=unembed[member])
        for name in MEASURES:
            assert found["whole"][name][member].item() == pytest.approx(alone[name], rel=1e-6, abs=1e-7), name
            assert found["whole"][name][member].item() == pytest.approx(expected[name], rel=2e-5, abs=2e-6), name
    assert not torch.isclose(found["whole"]["a_projection"][0], found["whole"]["a_projection"][1])


def test_a_reset_forgets():
    separation = Separation(2, 5, 7)
    for seed in (1, 2):
        separation.reset()
        one = batch(seed)
        separation.update(one["logits"], one["x"], one["labels"], torch.ones(2, 5, 7))
    fresh = Separation(2, 5, 7)
    fresh.update(one["logits"], one["x"], one["labels"], torch.ones(2, 5, 7))
    for name, values_S in fresh.compute()[0].items():
        assert torch.equal(separation.compute()[0][name], values_S), name


@pytest.mark.parametrize("double", [False, True])
def test_losses_of_shared_and_of_own_labels(double):
    one = batch(4, members=3)
    own = torch.stack([one["labels"], one["labels"].flip(0), one["labels"].roll(1, 1)])
    own[2, 0] = -100  # so that members differ in how many positions they have
    for labels in (one["labels"], own):
        losses_S = member_losses(one["logits"], labels, double)
        assert losses_S.dtype == (torch.float64 if double else torch.float32)
        for member, labels_BT in enumerate(labels.expand(3, 6, 4)):
            z_NV = one["logits"][member].double()
            places = (labels_BT != -100).nonzero().tolist()
            losses = [-math.log(z_NV[b, t, labels_BT[b, t]].exp() / z_NV[b, t].exp().sum()) for b, t in places]
            expected = sum(losses) / len(losses)
            assert losses_S[member].item() == pytest.approx(expected, rel=1e-12 if double else 1e-5)


def test_a_loss_that_fp32_rounds_to_zero_is_there_in_fp64():
    logits = torch.tensor([20.0, 0.0]).expand(2, 1, 3, 2).clone().requires_grad_()
    labels = torch.tensor([[0, 0, -100]])
    assert member_losses(logits, labels).tolist() == [0, 0]
    losses_S = member_losses(logits, labels, double=True)
    torch.testing.assert_close(losses_S, torch.full((2,), math.log1p(math.exp(-20)), dtype=torch.float64), **EXACT)
    assert (losses_S > 0).all()
    losses_S.sum().backward()
    torch.testing.assert_close(logits.grad[:, 0, :2, 1], torch.full((2, 2), math.exp(-20) / 2), rtol=1e-5, atol=0)
    assert (logits.grad[:, 0, 2] == 0).all()


def simplex(dimensions: int) -> torch.Tensor:
    """D + 1 unit vectors in D dimensions with cosine -1/D between any two; in 2D the Mercedes-Benz frame."""
    centred = torch.eye(dimensions + 1, dtype=torch.float64) - 1 / (dimensions + 1)
    axes = torch.linalg.svd(centred).Vh[:dimensions]
    return torch.nn.functional.normalize(centred @ axes.mT, dim=1)


def welch(length: int, dimensions: int) -> float:
    return math.sqrt((length - dimensions) / (dimensions * (length - 1)))


def test_overlap_of_orthogonal_and_of_identical_positions():
    orthogonal, identical = torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([[1.0, 2.0, 2.0]]).repeat(3, 1)
    opposite = torch.tensor([[1.0, 0, 0], [-2.0, 0, 0], [4.0, 0, 0]])
    overlaps_S = position_overlap(torch.stack([orthogonal, identical, opposite]))
    torch.testing.assert_close(overlaps_S, torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("dimensions", [2, 3, 7])
def test_tight_frames_reach_welchs_bound(dimensions):
    frame = simplex(dimensions)
    (overlap,) = position_overlap(frame[None]).tolist()
    assert overlap == pytest.approx(1 / dimensions)
    assert overlap == pytest.approx(welch(dimensions + 1, dimensions))
    bases = torch.cat([torch.eye(dimensions), torch.linalg.qr(torch.randn(dimensions, dimensions))[0]])
    (overlap,) = position_overlap(bases[None]).tolist()
    assert overlap == pytest.approx(welch(2 * dimensions, dimensions))  # two bases are tight too, however they lie


def test_crowded_positions_overlap_more_than_the_bound():
    random = torch.Generator().manual_seed(0)
    crowded = torch.randn(20, 9, 4, generator=random)
    overlaps_S = position_overlap(crowded)
    assert (overlaps_S > welch(9, 4)).all()
    lengths = torch.rand(20, 9, 1, generator=random) + 0.1
    torch.testing.assert_close(position_overlap(lengths * crowded), overlaps_S, rtol=1e-5, atol=0)
    pairs = [(a, b) for a in range(9) for b in range(9) if a != b]
    cosines = [float(torch.cosine_similarity(crowded[0, a], crowded[0, b], dim=0)) for a, b in pairs]
    expected = math.sqrt(sum(cosine**2 for cosine in cosines) / len(cosines))
    assert overlaps_S[0].item() == pytest.approx(expected, rel=1e-5)
