"""Figures of an examination, readable at the width that TensorBoard shows, about 600 pixels.

Shapes: B problems, F features.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_modules.telepathy.results import CONDITIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 6.0  # inches: 600 pixels at matplotlib's 100 per inch, so a font is shown at its size in points
MARKERS = "osD^v"
WORDS = 6  # at soft tokens in a map

Array = NDArray[np.floating]


def principal_components(points_NF: Array) -> tuple[Array, list[float]]:
    """Return points_N2 at their first two principal components, and the share of the variance along each.

    Args:
        points_NF: Finite points with F >= 2. Of fewer than two points there is no variance: all shares are 0.
    """
    if len(points_NF) < 2:
        return np.zeros((len(points_NF), 2)), [0.0, 0.0]
    left, values, _ = np.linalg.svd(points_NF - points_NF.mean(0), full_matrices=False)
    total = max(float((values**2).sum()), 1e-30)
    return (left * values)[:, :2], [float(value**2) / total for value in values[:2]]


def loss_by_position(losses: Sequence[dict[str, Array]]) -> "Figure":
    """Draw the mean cross-entropy of answer tokens by their position in the answer, under each condition.

    Args:
        losses: For each problem, condition -> cross-entropy of each answer token, in nats.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    lengths = [len(next(iter(by_condition.values()))) for by_condition in losses]
    longest = int(np.quantile(lengths, 0.9))  # few answers are longer, too few for a mean
    conditions = [condition for condition in CONDITIONS if condition in losses[0]]
    for condition in conditions:
        rows = [by_condition[condition] for by_condition in losses]
        axes.plot([np.mean([row[n] for row in rows if len(row) > n]) for n in range(longest)], label=condition)
    axes.set(xlabel="position in the answer", ylabel="cross-entropy (nats)", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def soft_token_map(soft_BF: Array, templates: Sequence[str]) -> "Figure":
    """Draw the soft tokens of each input at their first two principal components, coloured by template.

    Inputs whose soft tokens are not finite are left out, and their number is in the title.

    Args:
        soft_BF: The soft tokens, at least two features.
        templates: The template of each input.
    """
    from matplotlib.figure import Figure

    finite_B = np.isfinite(soft_BF.sum(1))
    points_B2, share = principal_components(soft_BF[finite_B])
    templates = [template for template, finite in zip(templates, finite_B, strict=True) if finite]
    names = sorted(set(templates))
    rows = -(-len(names) // 3)
    figure = Figure(figsize=(WIDTH, 4.4 + 0.2 * rows), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        mine_B = np.array([template == name for template in templates])
        marker = MARKERS[number // 10 % len(MARKERS)]
        axes.scatter(
            points_B2[mine_B, 0], points_B2[mine_B, 1], s=22, color=f"C{number % 10}", marker=marker, label=name
        )
    axes.set(xlabel=f"component 1 ({share[0]:.0%} of the variance)", ylabel=f"component 2 ({share[1]:.0%})")
    lost = len(finite_B) - len(points_B2)
    axes.set_title("soft tokens by template" + (f", {lost} not finite" if lost else ""), fontsize=11)
    if names:
        figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False, handletextpad=0.2)
    return figure


def cosine_map(soft_BF: Array, templates: Sequence[str]) -> "Figure":
    """Draw the cosines between the soft tokens of all inputs, sorted by template; blank where they are not finite."""
    from matplotlib.figure import Figure

    order = np.argsort(templates, kind="stable")
    sorted_BF = np.where(np.isfinite(soft_BF), soft_BF, np.nan)[order]
    unit_BF = sorted_BF / np.maximum(np.linalg.norm(sorted_BF, axis=1, keepdims=True), 1e-12)
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(unit_BF @ unit_BF.T, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set(xlabel="input, sorted by template", ylabel="input")
    axes.set_title("cosine between soft tokens", fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.9)
    return figure


def embedding_map(snapshots: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw soft tokens among the embeddings of the target, a panel for each step, a colour for each question.

    The axes are the first two principal components of the embeddings. At up to six soft tokens of the first question
    stands the nearest word.

    Args:
        snapshots: What `lightning_modules.telepathy.embedding_map.snapshot` returns, one per step.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * len(snapshots) ** 0.75, WIDTH * 0.8), layout="constrained")
    panels = figure.subplots(1, len(snapshots), sharex=True, sharey=True, squeeze=False)[0]
    for axes, one in zip(panels, snapshots, strict=True):
        axes.scatter(*np.array(one["embeddings"]).T, s=6, color="0.8", label="embeddings")
        for number, question in enumerate(one["questions"]):
            points_K2 = np.array(question["points"])
            axes.scatter(points_K2[:, 0], points_K2[:, 1], s=12, color=f"C{number % 10}", alpha=0.7)
        first = one["questions"][0]
        for place in range(0, len(first["points"]), -(-len(first["points"]) // WORDS)):
            axes.annotate(repr(first["words"][place])[1:-1], first["points"][place], fontsize=8)
        axes.set(title=f"step {one['step']}", xlabel="component 1")
    panels[0].set_ylabel("component 2")
    return figure
