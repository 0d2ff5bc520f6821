"""The positions of prompt, question, soft tokens and answer: token rows, and the gather that packs them.

Shapes: B batch, K soft tokens or question tokens, H tokens before them, A positions after them, L = H + K + A, T packed
positions, N answer tokens of the whole batch.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_modules.pretrained.prompts import Prompt, pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class CutText:
    """The tokens of one text `before question after answer`, in these four parts."""

    before: list[int]
    question: list[int]
    after: list[int]
    answer: list[int]


def cut(
    tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, questions: list[str], answers: list[str]
) -> list[CutText]:
    """Tokenize each `prompt(question) answer` as one text and cut the tokens at the seams of the prompt.

    The parts are not tokenized alone, because a tokenizer may split them differently. The token that holds the space
    before the question belongs to the question.
    """
    prompts = [prompt.fill(question) for question in questions]
    texts = [f"{filled} {answer}" for filled, answer in zip(prompts, answers, strict=True)]
    encoding = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    cut_texts = []
    for tokens, offsets, question, filled in zip(
        encoding["input_ids"], encoding["offset_mapping"], questions, prompts, strict=True
    ):
        ends = [end for _, end in offsets]
        seams = [len(prompt.before.rstrip()), len(prompt.before) + len(question), len(filled)]
        first, second, third = (bisect_left(ends, seam + 1) for seam in seams)
        cut_texts.append(CutText(tokens[:first], tokens[first:second], tokens[second:third], tokens[third:]))
    return cut_texts


@dataclass
class Packing:
    """How padded parts side by side, `[head | body | tail]`, become rows without holes.

    Attributes:
        order_BT: Columns of the real positions of each row, in order; padding comes last.
        predict_N: Flat positions (row * T + column) whose logits predict the answer tokens.
        labels_N: The answer tokens.
    """

    order_BT: Tensor
    predict_N: Tensor
    labels_N: Tensor


def pack(head: int, body_mask_BK: Tensor, after: list[int], answers: list[list[int]]) -> tuple[Tensor, Packing]:
    """Plan rows of a head, the real positions of the body, the tokens `after` it, and the answer.

    Args:
        head: H, the same for all rows.
        body_mask_BK: True at real positions of the body.
        after: The tokens between body and answer.
        answers: The tokens of each answer.

    Returns:
        tail_BA, the padded tokens of `after` and the answer; and the packing.
    """
    tail_BA, tail_mask_BA = pad([after + answer for answer in answers], 0)
    head_mask_BH = body_mask_BK.new_ones(len(answers), head)
    mask_BL = torch.cat([head_mask_BH, body_mask_BK, tail_mask_BA], dim=1)
    length_B = mask_BL.sum(1)
    order_BT = (~mask_BL).long().argsort(dim=1, stable=True)[:, : int(length_B.max())]
    labels_N = torch.tensor([token for answer in answers for token in answer])
    counts_B = torch.tensor([len(answer) for answer in answers])
    # The position before an answer's first token predicts it: column length - count - 1 of its row
    first_B = torch.arange(len(answers)) * order_BT.shape[1] + length_B - counts_B - 1
    within_N = torch.arange(len(labels_N)) - (counts_B.cumsum(0) - counts_B).repeat_interleave(counts_B)
    predict_N = first_B.repeat_interleave(counts_B) + within_N
    return tail_BA, Packing(order_BT, predict_N, labels_N)
