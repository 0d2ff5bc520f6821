"""The measures of a gated delta mixer as a picture and as a table, head by head.

Shapes: H heads, R singular values.
"""

from typing import TYPE_CHECKING

from lightning_modules.groundthink.probes.keys import random_cosine
from lightning_modules.groundthink.probes.needles import ROLES
from lightning_modules.groundthink.probes.state import StateMeasures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEYS = {"key_cosine": "all tokens", "key_cosine_needles": "needles", "key_cosine_filler": "needle\nand filler"}
MOST_LISTED = 8  # heads in a legend


def markdown(measures: StateMeasures) -> str:
    """Return the measures by head as a table."""
    heads = range(len(measures.spectrum_HR))
    head = ["measure", *(f"head {index}" for index in heads), "mean"]
    body = []
    for name, x_H in measures.by_head.items():
        body.append([name, *(f"{float(x):.4g}" for x in x_H), f"{float(x_H.mean()):.4g}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])


def picture(measures: StateMeasures, title: str, key_width: int) -> "Figure":
    """Draw gates by role, likeness of keys, singular values, self-retrieval after later needles, and capacity.

    Args:
        measures: The measures.
        title: Name of the mixer.
        key_width: K.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7.5), layout="constrained")
    figure.suptitle(title, fontsize=12)
    (decay, beta), (keys, spectrum), (later, capacity) = figure.subplots(3, 2)
    _bars(decay, measures, {f"decay_{role}": role for role in ROLES})
    decay.set_ylabel("decay exp(g)", fontsize=10)
    _bars(beta, measures, {f"beta_{role}": role for role in ROLES})
    beta.set_ylabel("writing strength beta", fontsize=10)
    _bars(keys, measures, KEYS)
    keys.axhline(random_cosine(key_width), color="gray", linestyle="--", linewidth=1, label="random")
    keys.set_ylabel("mean |cosine| of keys", fontsize=10)
    for index, values_R in enumerate(measures.spectrum_HR.tolist()):
        spectrum.plot(range(1, len(values_R) + 1), values_R, color=f"C{index % 10}")
    spectrum.set(xlabel="number", ylim=(0, None))
    spectrum.set_ylabel("singular value of the state", fontsize=10)
    ages = list(measures.later)
    for index in range(len(measures.spectrum_HR)):
        cosine = [float(x_H[index]) for x_H in measures.later.values()]
        later.plot(ages, cosine, marker="o", markersize=3, color=f"C{index % 10}", label=f"head {index}")
    later.set(xlabel="needles written since", ylim=(min(0.0, *later.get_ylim()), 1.02))
    later.set_ylabel("cosine of value and read", fontsize=10)
    sizes = list(measures.capacity_curve)
    shares = [hits / count for hits, count in measures.capacity_curve.values()]
    capacity.plot(sizes, shares, marker="o", markersize=3, color="black")
    capacity.axvline(key_width, color="gray", linestyle="--", linewidth=1)
    capacity.set_xscale("log", base=2)
    capacity.set(xlabel="writes (dashed: key width)", ylim=(0, 1.02))
    capacity.set_ylabel("values found", fontsize=10)
    if len(measures.spectrum_HR) <= MOST_LISTED:
        figure.legend(*later.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _bars(axes: "Axes", measures: StateMeasures, names: dict[str, str]) -> None:
    heads = len(measures.spectrum_HR)
    for index in range(heads):
        offsets = [place + (index + 0.5) / heads * 0.8 - 0.4 for place in range(len(names))]
        values = [float(measures.by_head[name][index]) for name in names]
        axes.bar(offsets, values, width=0.8 / heads, color=f"C{index % 10}")
    axes.set_xticks(range(len(names)), list(names.values()), fontsize=9)
