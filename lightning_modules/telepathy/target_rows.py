"""From questions and answers to the target's rows: the prompt in tokens, and the place for vectors in it."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from datamodules.errors import UserError
from lightning_modules.pretrained.prompts import (
    Prompt,
    added_tokens,
    behind,
    check_tokens,
    continued,
    encode,
    with_added,
)
from lightning_modules.telepathy.flaws import PRIMER, Flaw
from lightning_modules.telepathy.layout import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_FLAWS: set[Flaw] = {"bos_behind", "primer_mismatch", "missing_bos"}
REPEAT = "\nRepeat:"  # asks for a repetition of the question, as the embedded target was trained

Around = tuple[list[int], int]  # a prompt without the question, and the place of the vectors in it


class TargetRows:
    """Makes the rows of a target.

    Args:
        tokenizer: The target's tokenizer.
        prompt: The text around the question.
        end: The token that ends an answer.
        vocabulary: Number of tokens that the target has.
        path: The target's name in messages.
        flaws: Flaws of the notes in the rows for soft tokens: `bos_behind`, `primer_mismatch`, `missing_bos`.

    Raises:
        UserError: A flaw would change nothing.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        prompt: Prompt,
        end: int,
        vocabulary: int,
        path: str,
        flaws: Collection[Flaw],
    ):
        self.tokenizer, self.prompt, self.path = tokenizer, prompt, path
        self._end, self._vocabulary = end, vocabulary
        self._added = [] if prompt.has_special_tokens else added_tokens(tokenizer)[0]
        self._trained, self._asked = self._prompts(flaws)
        self._repeat = self._around_vectors(prompt.before, REPEAT, ())
        for flaw in sorted(PROMPT_FLAWS.intersection(flaws)):
            if self._prompts(set(flaws) - {flaw}) == (self._trained, self._asked):
                raise UserError(f"model.reproduce_flaws: {flaw} would change nothing in the prompt of this target")

    def _prompts(self, flaws: Collection[Flaw]) -> tuple[Around, Around]:
        """Return the prompts of training, and of asking."""
        before, after = self.prompt.before, self.prompt.after
        asked = PRIMER if "primer_mismatch" in flaws else before
        return self._around_vectors(before, after, flaws), self._around_vectors(asked, after, flaws, asks=True)

    def _around_vectors(self, before: str, after: str, flaws: Collection[Flaw], asks: bool = False) -> Around:
        before, added = before.rstrip(" "), [] if asks and "missing_bos" in flaws else self._added
        _, tail = continued(self.tokenizer, [before + "x"], [after])[0]
        head = with_added(encode(self.tokenizer, [before])[0] if before else [], added)
        if "bos_behind" in flaws:
            head, tail = [], added or [self._end]
        # A model without BOS and with an empty prompt still needs a token before an answer without a question
        return (head + tail, len(head)) if head + tail else ([self._end], 1)

    @property
    def head(self) -> list[int]:
        """The tokens before vectors in training."""
        tokens, place = self._trained
        return tokens[:place]

    def soft(self, questions: Sequence[str], answers: Sequence[str], training: bool = True) -> list[Row]:
        """Return the rows for soft tokens; their place is that of the question."""
        around = self._trained if training else self._asked
        return [Row(*around, reply) for _, reply in self._tokens(questions, answers)]

    def autoencode(self, questions: Sequence[str], answers: Sequence[str]) -> list[Row]:
        """Return the rows for soft tokens in which the question is to be repeated and then to be answered."""
        between = self.prompt.after + self.prompt.separator
        return self.readback([question + between + a for question, a in zip(questions, answers, strict=True)])

    def readback(self, questions: Sequence[str]) -> list[Row]:
        """Return the rows for soft tokens in which the question is to be repeated."""
        return [Row(*self._repeat, reply) for _, reply in self._tokens([""] * len(questions), questions)]

    def text(self, questions: Sequence[str], answers: Sequence[str]) -> list[Row]:
        """Return the rows with the text of the questions; the place for vectors is right before the question."""
        _, places = behind(self.tokenizer, self.prompt.before, questions)
        rows = []
        for (tokens, reply), place in zip(self._tokens(questions, answers), places, strict=True):
            prompt = with_added(tokens, self._added)
            rows.append(Row(prompt, len(prompt) - len(tokens) + place, reply))
        return rows

    def _tokens(self, questions: Sequence[str], answers: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of each prompt with its question, and of the answer behind it, the end token last."""
        prompts = [self.prompt.fill(question) for question in questions]
        replies = [self.prompt.separator + answer for answer in answers]
        rows = continued(self.tokenizer, prompts, replies)
        check_tokens([part for row in rows for part in row], self._vocabulary, "model.target", self.path)
        return [(prompt, [*reply, self._end]) for prompt, reply in rows]

    def question_tokens(self, questions: Sequence[str]) -> list[list[int]]:
        """Return the tokens that hold the characters of each question."""
        wholes, places = behind(self.tokenizer, self.prompt.before, questions)
        return [whole[place:] for whole, place in zip(wholes, places, strict=True)]
