"""Objectives that compare soft tokens with what they should contain: embeddings, source states, words.

Shapes: B batch, S source positions, C source width, K soft tokens, Q tokens, D target width, V vocabulary.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.telepathy.averages import masked_mean, row_mean
from lightning_modules.telepathy.objectives.heads import Readout, WordHead
from lightning_modules.telepathy.objectives.step import BridgeStep, Objective, Sizes

Text = Literal["question", "answer"]
Distance = Literal["cosine", "mse"]


def anchor(soft_BD: Tensor, text_BD: Tensor, distance: Distance, centred: bool = True) -> Tensor:
    """Return the distance of mean soft tokens from the mean embeddings of a text, a mean over the batch.

    `cosine`: 1 - cos; `mse`: the mean square difference. Both sides are centred over the batch: means of embeddings are
    so alike that one vector for all inputs would satisfy the cosine.
    """
    soft_BD, text_BD = soft_BD.float(), text_BD.float()
    if centred:
        soft_BD, text_BD = soft_BD - soft_BD.mean(0), text_BD - text_BD.mean(0)
    if distance == "mse":
        return F.mse_loss(soft_BD, text_BD)
    return (1 - F.cosine_similarity(soft_BD, text_BD, dim=1)).mean()


def bag_of_words(logits_BV: Tensor, present_BV: Tensor) -> Tensor:
    """Return the binary cross-entropy of the words, as a mean of its mean over present and its mean over absent words.

    Few words are present, so a plain mean is small for the words' base rates alone; this one is at least ln 2.
    """
    sides = []
    for where_BV, sign in ((present_BV, 1), (~present_BV, -1)):
        loss_BV = -F.logsigmoid(sign * logits_BV.float()) * where_BV
        sides.append(loss_BV.sum(1) / where_BV.sum(1).clamp_min(1))
    return (torch.stack(sides).sum(0) / 2).mean()


def make_anchor(text: Text = "question", distance: Distance = "cosine") -> Objective:
    """The distance from a text in the target's embeddings.

    Args:
        text: The text.
        distance: The distance; both sides of `mse` are in units of the embeddings' root mean square.
    """

    def loss(step: BridgeStep) -> Tensor:
        soft_BD = step.gather(masked_mean(step.soft_BKD, step.batch["soft_mask"]))
        text_BD = step.gather(masked_mean(*step.embedded(text)))
        if distance == "mse" and "anchor_scale" not in step.flaws:
            soft_BD, text_BD = soft_BD / step.scale, text_BD / step.scale
        return anchor(soft_BD, text_BD, distance, "constant_anchor" not in step.flaws)

    return Objective(loss, needs=(text,))


def make_reconstruction(distance: Distance = "mse") -> Objective:
    """The distance between the source's states and what a trained head reads of them in the soft tokens.

    Each state is compared on its own, after a LayerNorm. With the flaw `mean_pool` only means are compared, in which
    questions hardly differ.

    Args:
        distance: The distance.
    """

    def loss(step: BridgeStep) -> Tensor:
        states_BSC, mask_BS = step.encoding.states_BSC, step.batch["source_mask"]
        soft_BKD, mask_BK, head = step.soft_BKD / step.scale, step.batch["soft_mask"], step.heads["reconstruction"]
        if "mean_pool" in step.flaws:
            read_BC = head(masked_mean(soft_BKD, mask_BK))
            return anchor(read_BC, masked_mean(states_BSC, mask_BS), distance, centred=False)
        states_BSC = F.layer_norm(states_BSC, states_BSC.shape[-1:])
        read_BSC = head(soft_BKD, mask_BK, states_BSC.shape[1])
        if distance == "mse":
            return row_mean((read_BSC - states_BSC).square().mean(-1), mask_BS)
        return row_mean(1 - F.cosine_similarity(read_BSC, states_BSC, dim=-1), mask_BS)

    def head(sizes: Sizes) -> nn.Module:
        linear = nn.Linear(sizes.target, sizes.source)
        return linear if "mean_pool" in sizes.flaws else Readout(sizes.target, sizes.source)

    return Objective(loss, head=head)


def make_bag_of_words() -> Objective:
    """Which of the target's words the question has. With the flaw `own_head` a trained head reads the bridge's output.

    That head reads the largest value of each feature before the output is scaled, and its loss is a plain mean over the
    vocabulary, as in the notes.
    """

    def loss(step: BridgeStep) -> Tensor:
        batch, head, words_VD = step.batch, step.heads["bag_of_words"], step.target.embedding.weight
        mask_BK, question_BQ = batch["soft_mask"], batch["question"]
        present_BV = torch.zeros(len(question_BQ), len(words_VD), device=words_VD.device)
        present_BV = present_BV.scatter_add(1, question_BQ, batch["question_mask"].float()) > 0
        if "own_head" in step.flaws:
            pooled_BD = step.encoding.bridged_BKD.masked_fill(~mask_BK[..., None], -torch.inf).amax(1)
            return F.binary_cross_entropy_with_logits(head(pooled_BD), present_BV.float())
        return bag_of_words(head(step.soft_BKD, mask_BK, words_VD), present_BV)

    def head(sizes: Sizes) -> nn.Module:
        return nn.Linear(sizes.target, sizes.vocabulary) if "own_head" in sizes.flaws else WordHead()

    return Objective(loss, needs=("question",), head=head)
