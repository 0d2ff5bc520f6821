"""The measures of a gated delta mixer as pictures and as a table, head by head.

Shapes: T positions, H heads, R singular values.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_modules.groundthink.probes.keys import random_cosine
from lightning_modules.groundthink.probes.needles import ROLES
from lightning_modules.groundthink.probes.state import GateTrace, StateMeasures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEYS = {"key_cosine": "all tokens", "key_cosine_needles": "needles", "key_cosine_filler": "needle\nand filler"}
MOST_LISTED = 8  # heads in a legend
AFTER = "cosine_after_"


def markdown(measures: StateMeasures) -> str:
    """Return the measures by head as a table."""
    head = ["measure", *(f"head {index}" for index in range(len(measures.spectrum_HR)))]
    body = [[name, *(f"{float(x):.4g}" for x in x_H)] for name, x_H in measures.by_head.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])


def picture(measures: StateMeasures, name: str, key_width: int) -> "Figure":
    """Draw gates by role, likeness of keys, singular values, self-retrieval after later needles, and capacity.

    Args:
        measures: The measures.
        name: Name of the mixer.
        key_width: K.
    """
    from matplotlib.figure import Figure

    heads = range(len(measures.spectrum_HR))
    figure = Figure(figsize=(7, 7.5), layout="constrained")
    place = f"head {measures.head} holds the needles, written {measures.lag} positions behind their keys"
    figure.suptitle(f"{name}\n{place}", fontsize=11)
    (decay, beta), (keys, spectrum), (later, capacity) = figure.subplots(3, 2)
    by_role = {role: role for role in (*ROLES, "write")}
    _bars(decay, by_role, {role: 1 - measures.by_head[f"decay_{role}"] for role in by_role})
    decay.set_yscale("log")  # a head may keep all but a millionth
    decay.set_ylabel("forgotten, 1 - exp(g)")
    _bars(beta, by_role, {role: measures.by_head[f"beta_{role}"] for role in by_role})
    beta.set_ylabel("writing strength beta")
    _bars(keys, KEYS, measures.by_head)
    keys.axhline(random_cosine(key_width), color="gray", linestyle="--", linewidth=1)
    keys.set_ylabel("mean |cosine| of keys\n(dashed: random)")
    ages = [int(measure.removeprefix(AFTER)) for measure in measures.by_head if measure.startswith(AFTER)]
    sizes = list(measures.capacity_curve)
    for head in heads:
        style: dict[str, Any] = {"color": f"C{head % 10}", "marker": "o", "markersize": 3}
        values_R = measures.spectrum_HR[head].tolist()
        spectrum.plot(range(1, len(values_R) + 1), values_R, **style)
        cosines = [float(measures.by_head[f"{AFTER}{age}"][head]) for age in ages]
        later.plot(ages, cosines, label=f"head {head}", **style)
        capacity.plot(sizes, [float(hits_H[head]) / n for hits_H, n in measures.capacity_curve.values()], **style)
    spectrum.set(xlabel="number", ylabel="singular value", ylim=(0, None))
    later.set(xlabel="needles written since", ylabel="cosine of value and read")
    later.set_ylim(min(0.0, later.get_ylim()[0]), 1.02)
    capacity.set_xscale("log", base=2)
    capacity.axvline(key_width, color="gray", linestyle="--", linewidth=1)
    capacity.set(xlabel="writes (dashed: key width)", ylabel="values found", ylim=(0, 1.02))
    if len(heads) <= MOST_LISTED:
        figure.legend(*later.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def trace_picture(trace: GateTrace, name: str, head: int) -> "Figure":
    """Draw the gates of one head along a row, with the tokens of the needles and the queries marked.

    Args:
        trace: The gates.
        name: Name of the mixer.
        head: The head.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    figure.suptitle(f"{name}, head {head}: gates along a row", fontsize=11)
    axes = figure.subplots(2, 1, sharex=True)
    for each, gate_T in zip(axes, (trace.forgotten_TH[:, head], trace.beta_TH[:, head]), strict=True):
        each.plot(gate_T.tolist(), color="gray", linewidth=0.8)
        for number, role in enumerate(ROLES):
            if role != "filler":
                places = trace.places[role]
                each.plot(places, gate_T[places].tolist(), "osD"[number], color=f"C{number}", markersize=4, label=role)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("forgotten, 1 - exp(g)")
    axes[1].set(xlabel="position", ylabel="writing strength beta", ylim=(0, None))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _bars(axes: "Axes", names: dict[str, str], by_head: Mapping[str, Tensor]) -> None:
    heads = len(by_head[next(iter(names))])
    for head in range(heads):
        places = [number + (head + 0.5) / heads * 0.8 - 0.4 for number in range(len(names))]
        values = [float(by_head[name][head]) for name in names]
        axes.bar(places, values, width=0.8 / heads, color=f"C{head % 10}")
    axes.set_xticks(range(len(names)), list(names.values()), fontsize=9)
