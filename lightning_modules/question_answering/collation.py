"""From problems to batches: prompts, answers and labels in tokens.

Shapes: B batch, T positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

from datamodules.batch import IGNORE, TokenBatch
from datamodules.problems import Problem
from lightning_modules.pretrained.prompts import Prompt, added_tokens, continued, pad, with_added

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EvaluationBatch(TokenBatch):
    """A batch with what generation needs.

    Attributes:
        prompts: Tokens of the prompts alone, BOS first.
        problems: The problems, one per row.
    """

    prompts: list[list[int]]
    problems: Sequence[Problem]


@dataclass(frozen=True)
class Collation:
    """How problems become rows of tokens.

    Attributes:
        prompt: The text around the question.
        repeat_prompt: The text around a question that the model should repeat.
        repeat_fraction: Share of training problems that use `repeat_prompt`.
        answer_only: Leave the prompt out of the labels.
    """

    prompt: Prompt
    repeat_prompt: Prompt
    repeat_fraction: float
    answer_only: bool

    def batch(
        self,
        problems: Sequence[Problem],
        tokenizer: "PreTrainedTokenizerBase",
        end: list[int],
        filler: int,
        training: bool,
    ) -> TokenBatch | EvaluationBatch:
        """Return a batch; the label of a position is the next token, and a batch for evaluation also has the prompts.

        Args:
            problems: The problems, one per row.
            tokenizer: The tokenizer.
            end: The tokens behind an answer.
            filler: The token behind the end of a row.
            training: Whether the batch is for training.
        """
        before = added_tokens(tokenizer)[0]
        questions, outputs = [], []
        for problem in problems:
            # By hash, so that it is the same on every rank, in every worker and after a resume
            repeat = training and crc32(b"repeat" + problem.question.encode()) / 2**32 < self.repeat_fraction
            around = self.repeat_prompt if repeat else self.prompt
            questions.append(around.fill(problem.question))
            outputs.append(around.separator + (problem.question if repeat else problem.answer))
        rows = continued(tokenizer, questions, outputs)
        prompts, answers = [with_added(first, before) for first, _ in rows], [second + end for _, second in rows]
        tokens_BT, mask_BT = pad([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)], filler)
        labels_BT = tokens_BT.masked_fill(~mask_BT, IGNORE).roll(-1, dims=1)
        labels_BT[:, -1] = IGNORE
        if self.answer_only:
            for label_T, prompt in zip(labels_BT, prompts, strict=True):
                label_T[: len(prompt) - 1] = IGNORE  # the prompt's last token predicts the answer's first
        batch = TokenBatch(tokens=tokens_BT, labels=labels_BT)
        return batch if training else EvaluationBatch(**batch, prompts=prompts, problems=problems)
