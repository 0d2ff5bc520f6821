"""The flaws of the notes, by name. A config is sound; `model.reproduce_flaws` puts flaws back into it."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal

from lightning_modules.telepathy.layout import Row
from lightning_modules.telepathy.output_scale import OutputName, OutputScale

Flaw = Literal[
    "key_scale",  # states have the scale of Mistral's embeddings before a cross-attention without LayerNorm and places
    "bos_behind",  # no prompt, and the BOS between soft tokens and answer
    "mean_pool",  # V1, V8: the mean state is reconstructed, in which questions hardly differ
    "self_contrast",  # V2: the positive of the contrastive loss is the soft token itself
    "constant_anchor",  # V3 to V7: means are not centred over the batch, so that one vector for all inputs satisfies it
    "anchor_scale",  # V3: the squared error of an anchor at the own scale of embeddings has hardly a gradient
    "primer_mismatch",  # V4: the target is asked with other words before the soft tokens than in training
    "loud_output",  # V6: soft tokens are 33 times as large as embeddings
    "saturating_tanh",  # V7: a tanh bounds an output that grows, until it has no gradient
    "own_head",  # V9: a trained head finds the words in the bridge's output, where the target need not see them
    "missing_bos",  # V10: the target is asked without the BOS of its training
    "padding_labels",  # V10, V11: the padding of answers is in the labels
    "flow_scale",  # V12 to V14: embeddings of size 0.003 against noise of size 1
    "untrained_output",  # V13, V14: a random map stands behind the part that the flow loss trains
    "bare_codes",  # V15: codes go to the target by no map, or by a linear one
    "codebook_scale",  # V15: the codebook starts far below the size of its inputs
    "dead_diversity",  # V15: the variance has no gradient
    "pooled_variance",  # V15: the variance is taken over inputs and positions together
]
NOTES_SCALE = 0.003  # root mean square of the notes' source states, equal to that of Mistral 7B's embeddings
LOUD = 33.0  # times the scale of the embeddings: the notes' soft tokens had the size 1, their embeddings 0.03
V15: tuple[Flaw, ...] = ("key_scale", "bos_behind")  # of the last version, which `true` stands for
# What the notes' evaluation wrote before the soft tokens; they were trained behind another text
PRIMER = "Analysis of received thought vector: "


def chosen(flaws: bool | Collection[Flaw]) -> frozenset[Flaw]:
    """Return the flaws of `model.reproduce_flaws`, whose `true` stands for those of the last version."""
    if isinstance(flaws, bool):
        return frozenset(V15 if flaws else ())
    return frozenset(flaws)


def make_output(mode: OutputName, scale: float, flaws: Collection[Flaw]) -> OutputScale:
    """Return the output scale of a bridge."""
    factor = LOUD if "loud_output" in flaws else 1.0
    return OutputScale("tanh" if "saturating_tanh" in flaws else mode, factor * scale)


def padded(rows: Sequence[Row]) -> list[Row]:
    """Return rows whose answers all have the length of the longest one, with their last token repeated."""
    longest = max(len(row.answer) for row in rows)
    return [replace(row, answer=row.answer + row.answer[-1:] * (longest - len(row.answer))) for row in rows]
