"""Where prompt, question, soft tokens and answer stand: token rows and the gather that packs them.

Shapes: B batch, S source positions, K soft tokens, A positions after the soft tokens, T packed positions, N answer
tokens of the whole batch.
"""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_modules.pretrained.prompts import Prompt, pad


@dataclass
class Row:
    """One text in tokens, cut where the prompt says."""

    before: list[int]
    question: list[int]
    after: list[int]
    answer: list[int]


def cut(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, questions: list[str], answers: list[str]) -> list[Row]:
    """Tokenize `prompt(question) answer` as one text and cut the tokens at the prompt's seams.

    One text, since a tokenizer may write its parts otherwise; a token that holds the space before the question belongs
    to the question.
    """
    prompts = [prompt.fill(question) for question in questions]
    texts = [f"{filled} {answer}" for filled, answer in zip(prompts, answers, strict=True)]
    made = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    rows = []
    for tokens, offsets, question, filled in zip(
        made["input_ids"], made["offset_mapping"], questions, prompts, strict=True
    ):
        ends = [end for _, end in offsets]
        seams = [len(prompt.before.rstrip()), len(prompt.before) + len(question), len(filled)]
        first, second, third = (bisect_left(ends, seam + 1) for seam in seams)
        rows.append(Row(tokens[:first], tokens[first:second], tokens[second:third], tokens[third:]))
    return rows


@dataclass
class Packing:
    """How parts side by side become rows without holes.

    The parts are a head and a body and a tail, each padded, `[head | body | tail]`; `order_BT` picks the real positions
    in order. `predict_N` are flat positions (row * T + column) whose next token is the answer token `labels_N`.
    """

    order_BT: Tensor
    predict_N: Tensor
    labels_N: Tensor


def pack(head: int, body_mask_BK: Tensor, after: list[int], answers: list[list[int]]) -> tuple[Tensor, Packing]:
    """Plan rows of `head` tokens, the body's real ones, `after`, and the answer.

    Returns:
        tail_BA, the tokens of `after` and the answer, padded; and the packing.
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
