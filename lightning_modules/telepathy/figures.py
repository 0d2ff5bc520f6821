"""Figures of an examination, for TensorBoard.

Shapes: I inputs, F features.
"""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from lightning_modules.telepathy.report import Row


def loss_by_position(rows: "list[Row]") -> Figure:
    """Mean cross-entropy of the answer's tokens by their position, under each condition."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    lengths = [len(row.losses["bridge"]) for row in rows]
    longest = int(np.quantile(lengths, 0.9))  # beyond, too few answers are left to average
    for condition in rows[0].losses:
        table = np.full((len(rows), max(lengths)), np.nan)
        for i, row in enumerate(rows):
            table[i, : lengths[i]] = row.losses[condition]
        axes.plot(np.nanmean(table[:, :longest], axis=0), label=condition)
    axes.set(xlabel="position in the answer", ylabel="cross-entropy (nats)", ylim=(0, None))
    axes.legend()
    return figure


def soft_token_map(soft_IF: np.ndarray, templates: list[str]) -> Figure:
    """Soft tokens of the inputs along their first two principal components, coloured by template, and their cosines."""
    order = np.argsort(templates, kind="stable")
    soft_IF, templates = soft_IF[order], [templates[i] for i in order]
    centred_IF = soft_IF - soft_IF.mean(0)
    left, values, _ = np.linalg.svd(centred_IF, full_matrices=False)
    share = values**2 / max(float((values**2).sum()), 1e-30)
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    scatter, matrix = figure.subplots(1, 2)
    names = sorted(set(templates))
    colours = np.array([names.index(name) for name in templates])
    for number, name in enumerate(names):
        points = (left[:, :2] * values[:2])[colours == number]
        scatter.scatter(*points.T, s=14, color=f"C{number % 10}", marker="osD^v"[number // 10 % 5], label=name)
    scatter.set(xlabel=f"component 1 ({share[0]:.0%} of the variance)", ylabel=f"component 2 ({share[1]:.0%})")
    scatter.set_title("soft tokens by template")
    scatter.legend(fontsize=6, ncols=2)
    unit_IF = soft_IF / np.maximum(np.linalg.norm(soft_IF, axis=1, keepdims=True), 1e-12)
    image = matrix.imshow(unit_IF @ unit_IF.T, vmin=-1, vmax=1, cmap="RdBu_r")
    matrix.set_title("cosine between inputs, sorted by template")
    figure.colorbar(image, ax=matrix, shrink=0.8)
    return figure
