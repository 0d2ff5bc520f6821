"""A chain of two agents: one reads a question and passes it on, and the other answers.

By text, the source writes the question out token by token, and the target reads what it wrote. By soft tokens, the
source only reads, and the bridge turns its states into soft tokens. The answer is generated in both.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch

from datamodules.errors import UserError
from datamodules.problems import Problem
from lightning_modules.pretrained.causal_lm import reads_ahead
from lightning_modules.pretrained.generation import generate
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.pretrained.positions import positions
from lightning_modules.pretrained.prompts import Prompt, added_tokens, encode, with_added
from lightning_modules.telepathy.results import Indices, Measures, bootstrap
from lightning_modules.telepathy.target import Target

T = TypeVar("T")

LONGEST_MESSAGE = 2  # times the tokens of the question


class Receiver(Protocol):
    """A module that answers soft tokens."""

    @property
    def target(self) -> Target:
        """The frozen target."""
        ...

    def answer(self, questions: Sequence[str], limit: int) -> list[str]:
        """Answer questions from soft tokens, with at most `limit` tokens each."""
        ...


class Writer:
    """A causal language model that passes a question on by text.

    Args:
        pretrained: The model.
        prompt: What makes it write the question, with `{question}` in it.
        device: The device of the model.

    Raises:
        UserError: The model cannot be loaded, or is an encoder or another model that is not causal; the prompt has no
            `{question}`.
    """

    def __init__(self, pretrained: Pretrained, prompt: str, device: torch.device):
        self.model = pretrained.load_causal_lm().to(device).eval()
        if reads_ahead(self.model):
            raise UserError(f"AgentChain.writer: '{pretrained.path}' reads the tokens that it predicts: choose another")
        self.path, self.positions = pretrained.path, positions(self.model)
        self.tokenizer = pretrained.load_tokenizer()
        self.prompt, self.added = Prompt(prompt, "AgentChain.prompt"), added_tokens(self.tokenizer)[0]

    def write(self, question: str, limit: int | None = None) -> str:
        """Return the message, of at most `limit` tokens, or of twice as many as the question has.

        Raises:
            UserError: The model has too few positions for the question and the message.
        """
        tokens = with_added(encode(self.tokenizer, [self.prompt.fill(question)])[0], self.added)
        limit = limit or LONGEST_MESSAGE * len(encode(self.tokenizer, [question])[0])
        length = len(tokens) + limit
        if self.positions is not None and length > self.positions:
            raise UserError(
                f"AgentChain.writer: the question {question[:40]!r}... takes {length} positions, {limit} of them for "
                f"the message, and '{self.path}' has {self.positions}"
            )
        return generate(self.model, self.tokenizer, [tokens], limit, self.prompt.stop)[0].text


@dataclass(frozen=True)
class Passage:
    """One question on its way through both chains.

    Attributes:
        problem: The question.
        message: The text that the source wrote.
        text_answer: The answer to that text.
        soft_answer: The answer to soft tokens.
        write: Milliseconds from the question to the end of the message.
        reply: Milliseconds from the message to the end of the answer.
        first_written: The part of `write` before its second token.
        first_replied: The part of `reply` before its second token.
        soft: Milliseconds from the question to the end of the answer by soft tokens.
    """

    problem: Problem
    message: str
    text_answer: str
    soft_answer: str
    write: float
    reply: float
    first_written: float
    first_replied: float
    soft: float


def pass_on(module: Receiver, writer: Writer, problems: Sequence[Problem], limit: int) -> list[Passage]:
    """Pass questions on one at a time, each by text and by soft tokens.

    Args:
        module: Answers soft tokens, and has the target.
        writer: The source as a writer of text.
        problems: The questions.
        limit: Length limit of answers, in tokens.
    """

    def reply(message: str, length: int) -> str:
        return module.target.answers(module.target.rows.text([message], [""]), length)[0].text

    def passage(problem: Problem) -> Passage:
        write, message = _timed(lambda: writer.write(problem.question))
        first_written, _ = _timed(lambda: writer.write(problem.question, 1))
        replied, text_answer = _timed(lambda: reply(message, limit))
        first_replied, _ = _timed(lambda: reply(message, 1))
        soft, (soft_answer,) = _timed(lambda: module.answer([problem.question], limit))
        times = write, replied, first_written, first_replied, soft
        return Passage(problem, message, text_answer, soft_answer, *times)

    passage(problems[0])  # the first call of everything is slow
    return [passage(problem) for problem in problems]


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    """Return the milliseconds that a call takes, and its result: texts, so that the device has done its work."""
    start = time.perf_counter()
    result = call()
    return 1000 * (time.perf_counter() - start), result


def measure_chain(passages: Sequence[Passage]) -> Measures:
    """Compute the measures of a chain of two agents.

    - `text_ms`, `soft_ms`: time from the question to the end of the answer, by text and by soft tokens.
    - `saving`: 1 - soft_ms / text_ms.
    - `generation`: share of the time by text in which models generate: all of it but the time to the first token
      of the message and of the answer. `message`: share of the time by text that the message takes.
    - `text_accuracy`, `soft_accuracy`: share of right answers. `message_accuracy`: share of messages
      that are the question.

    Times are means over questions, with bootstrap intervals.
    """
    measures, count = Measures(), len(passages)
    stages_BP = np.array([[p.write, p.reply, p.first_written, p.first_replied, p.soft] for p in passages])
    write_B, reply_B, first_written_B, first_replied_B, soft_B = stages_BP.T
    text_B = write_B + reply_B

    def add(name: str, statistic: Callable[[Indices], float]) -> None:
        measures.add(name, statistic(np.arange(count)), count, bootstrap(count, statistic))

    add("text_ms", lambda i: text_B[i].mean())
    add("soft_ms", lambda i: soft_B[i].mean())
    add("saving", lambda i: 1 - soft_B[i].sum() / text_B[i].sum())
    add("generation", lambda i: 1 - (first_written_B + first_replied_B)[i].sum() / text_B[i].sum())
    add("message", lambda i: write_B[i].sum() / text_B[i].sum())
    measures.add_proportion("text_accuracy", [p.problem.is_correct(p.text_answer) for p in passages])
    measures.add_proportion("soft_accuracy", [p.problem.is_correct(p.soft_answer) for p in passages])
    measures.add_proportion("message_accuracy", [p.message == p.problem.question for p in passages])
    return measures
