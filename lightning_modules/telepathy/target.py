"""The frozen target, which answers soft tokens or text in the place of the question.

Shapes: B batch, K vectors in a row, D width, N answer tokens of the whole batch, V vocabulary.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from numpy.typing import NDArray
from torch import Tensor

from datamodules.errors import UserError
from lightning_modules.pretrained.causal_lm import (
    CHUNK,
    embedding_of,
    embedding_scale,
    logits_at,
    reads_ahead,
    recorded,
    vocabulary,
)
from lightning_modules.pretrained.generation import Answer, end_tokens, filler_token, generate
from lightning_modules.pretrained.key_values import key_values_of
from lightning_modules.pretrained.loading import Pretrained, positions
from lightning_modules.pretrained.prompts import (
    CHAT,
    Prompt,
    added_tokens,
    behind,
    check_tokens,
    continued,
    encode,
    with_added,
)
from lightning_modules.telepathy.flaws import PRIMER, Flaw
from lightning_modules.telepathy.frozen import Frozen
from lightning_modules.telepathy.layout import Packing, Row, pack, real_vectors

if TYPE_CHECKING:
    from lightning_modules.pretrained.loading import CausalLM

PROMPT_FLAWS: set[Flaw] = {"bos_behind", "primer_mismatch", "missing_bos"}
REPEAT = "\nRepeat:"  # asks for a repetition of the question, as the embedded target was trained


class Target(Frozen):
    """A frozen causal language model that answers vectors or text in its prompt.

    Args:
        pretrained: The model to load.
        prompt: The text around the question, or `chat`.
        flaws: Flaws of the notes in the rows for soft tokens: `bos_behind`, `primer_mismatch`, `missing_bos`.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        prompt: The text around the question.
        sites: Where vectors go in: the embedding, or the keys and values of all layers.
        positions: The most positions of a row that the model reads; None if it has no limit.

    Raises:
        UserError: The model cannot be used: it has no token that ends a text, or its prompt cannot be made; or a flaw
            would change nothing.
    """

    model: "CausalLM"

    def __init__(self, pretrained: Pretrained, prompt: str, flaws: Collection[Flaw] = ()):
        super().__init__(pretrained.load_causal_lm())
        self.path, self.static_cache = pretrained.path, pretrained.static_cache
        self.tokenizer = tokenizer = pretrained.load_tokenizer()
        self.prompt = Prompt.chat(tokenizer, self.path) if prompt == CHAT else Prompt(prompt)
        self.positions, self.sites = positions(self.model), embedding_of(self.model)
        ends = [end for end in end_tokens(self.model, tokenizer) if end < vocabulary(self.model)]
        if not ends:
            raise UserError(f"model.target: '{self.path}' has no token that ends a text: choose another model")
        self._end: int = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
        self._added = [] if self.prompt.has_special_tokens else added_tokens(tokenizer)[0]
        self._filler = filler_token(self.model, tokenizer)
        self._trained, self._asked = self._prompts(flaws)
        self._repeat = self._around_vectors(self.prompt.before, REPEAT, ())
        for flaw in sorted(PROMPT_FLAWS.intersection(flaws)):
            if self._prompts(set(flaws) - {flaw}) == (self._trained, self._asked):
                raise UserError(f"model.reproduce_flaws: {flaw} would change nothing in the prompt of this target")

    def _prompts(self, flaws: Collection[Flaw]) -> tuple[tuple[list[int], int], tuple[list[int], int]]:
        """Return the prompts without the question of training, and of asking; each with the place of the vectors."""
        before, after = self.prompt.before, self.prompt.after
        asked = PRIMER if "primer_mismatch" in flaws else before
        return self._around_vectors(before, after, flaws), self._around_vectors(asked, after, flaws, asks=True)

    def _around_vectors(
        self, before: str, after: str, flaws: Collection[Flaw], asks: bool = False
    ) -> tuple[list[int], int]:
        """Return the prompt without the question, and the place of the vectors in it."""
        before, added = before.rstrip(" "), [] if asks and "missing_bos" in flaws else self._added
        _, tail = continued(self.tokenizer, [before + "x"], [after])[0]
        head = with_added(encode(self.tokenizer, [before])[0] if before else [], added)
        if "bos_behind" in flaws:
            head, tail = [], added or [self._end]
        # A model without BOS and with an empty prompt still needs a token before an answer without a question
        return (head + tail, len(head)) if head + tail else ([self._end], 1)

    @property
    def width(self) -> int:
        """Width D of a vector: that of the embedding's output, or of all keys and values together."""
        return self.sites.width

    @property
    def embedding(self) -> torch.nn.Embedding:
        """The input embedding."""
        return self.model.get_input_embeddings()

    def embedding_scale(self) -> float:
        """Return the root mean square of the embedding's output over the vocabulary."""
        return embedding_scale(self.model)

    def take_key_values(self) -> list[int]:
        """Let vectors be keys and values of all layers from now on, and return each layer's number of features.

        Raises:
            UserError: The model's keys hold positions, or it passes more than keys and values from token to token.
        """
        self.sites = sites = key_values_of(self.model, self.path)
        return sites.layer_widths

    def scale(self) -> float:
        """Return the root mean square of the vectors of a text: of its embeddings, or of its standardised keys."""
        return 1.0 if self.takes_key_values else self.embedding_scale()

    @property
    def takes_key_values(self) -> bool:
        """Whether vectors are keys and values."""
        return self.sites.sites != (self.embedding,)

    @torch.no_grad()
    def vectors(self, tokens_BQ: Tensor) -> Tensor:
        """Return vectors_BQD of tokens behind the beginning of the prompt: those that the model makes of a text."""
        if not self.takes_key_values:
            embeds_BQD: Tensor = self.embedding(tokens_BQ)
            return embeds_BQD
        head = self._trained[0][: self._trained[1]]
        head_BT = torch.tensor(head, dtype=torch.long, device=tokens_BQ.device).expand(len(tokens_BQ), -1)
        with recorded(self.sites) as found:
            self.model(input_ids=torch.cat([head_BT, tokens_BQ], dim=1), use_cache=False)
        return self.sites.vectors(torch.cat(found, dim=-1))[:, len(head) :]

    def check(self, trains: bool) -> None:
        """Find out before a run whether the model is causal and answers vectors.

        Args:
            trains: Whether gradients have to reach the vectors, too.

        Raises:
            UserError: It is not, or does not.
        """
        rows = self.soft_rows(["x", "x y"], ["x", "y"])
        vectors_BKD = torch.full((2, 2, self.width), 0.01, device=self.model.device, requires_grad=trains)
        mask_BK = torch.tensor([[True, True], [True, False]])
        try:
            ahead, has_gradient = reads_ahead(self.model), True
            packing = move_data_to_device(self.pack(rows, mask_BK), self.model.device)
            if trains:
                with torch.enable_grad():
                    (grad_BKD,) = torch.autograd.grad(self.logits(packing, vectors_BKD).float().sum(), vectors_BKD)
                has_gradient = bool(grad_BKD.any())
            self.answers(rows, 2, vectors_BKD.detach(), mask_BK)
        except Exception as error:  # of any class: every architecture has code of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"model.target: '{self.path}' does not answer soft tokens: {reason}") from error
        if ahead:
            raise UserError(f"model.target: '{self.path}' reads the tokens that it predicts: choose a causal model")
        if not has_gradient:
            raise UserError(f"model.target: no gradient reaches soft tokens of '{self.path}': choose another model")

    def soft_rows(self, questions: Sequence[str], answers: Sequence[str], training: bool = True) -> list[Row]:
        """Return the rows for soft tokens; their place is that of the question."""
        around = self._trained if training else self._asked
        return [Row(*around, reply) for _, reply in self._tokens(questions, answers)]

    def autoencode_rows(self, questions: Sequence[str], answers: Sequence[str]) -> list[Row]:
        """Return the rows for soft tokens in which the question is to be repeated and then to be answered."""
        between = self.prompt.after + self.prompt.separator
        return self.readback_rows([question + between + a for question, a in zip(questions, answers, strict=True)])

    def readback_rows(self, questions: Sequence[str]) -> list[Row]:
        """Return the rows for soft tokens in which the question is to be repeated."""
        return [Row(*self._repeat, reply) for _, reply in self._tokens([""] * len(questions), questions)]

    def text_rows(self, questions: Sequence[str], answers: Sequence[str]) -> list[Row]:
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
        check_tokens([part for row in rows for part in row], vocabulary(self.model), "model.target", self.path)
        return [(prompt, [*reply, self._end]) for prompt, reply in rows]

    def question_tokens(self, questions: Sequence[str]) -> list[list[int]]:
        """Return the tokens that hold the characters of each question."""
        wholes, places = behind(self.tokenizer, self.prompt.before, questions)
        return [whole[place:] for whole, place in zip(wholes, places, strict=True)]

    def pack(self, rows: Sequence[Row], mask_BK: Tensor | None = None) -> Packing:
        """Pack rows with the real vectors of a mask.

        Raises:
            UserError: A row is longer than the model's positions.
        """
        packing = pack(rows, self._filler, mask_BK)
        self._check_length(packing.tokens_BT.shape[1])
        return packing

    def logits(self, packing: Packing, vectors_BKD: Tensor | None = None) -> Tensor:
        """Return logits_NV at the answer tokens alone."""
        return logits_at(self.model, packing.tokens_BT, packing.predict_N, vectors_BKD, packing.column_BT, self.sites)

    @torch.no_grad()
    def losses(
        self, rows: Sequence[Row], vectors_BKD: Tensor | None = None, mask_BK: Tensor | None = None
    ) -> list[NDArray[np.float32]]:
        """Return for each answer the cross-entropy of its tokens, in nats.

        Args:
            rows: The rows.
            vectors_BKD: Vectors in the place of each row; None for none.
            mask_BK: True at real vectors; needed with vectors.
        """
        packing = move_data_to_device(self.pack(rows, mask_BK), self.model.device)
        logits_NV: Any = self.logits(packing, vectors_BKD)  # `split` of a tensor has no types in torch
        labels_N: Any = packing.labels_N
        parts = [
            torch.nn.functional.cross_entropy(logits_CV.float(), labels_C, reduction="none").cpu().numpy()
            for logits_CV, labels_C in zip(logits_NV.split(CHUNK), labels_N.split(CHUNK), strict=True)
        ]
        return np.split(np.concatenate(parts), np.cumsum([len(row.answer) for row in rows])[:-1])

    def answers(
        self, rows: Sequence[Row], limit: int, vectors_BKD: Tensor | None = None, mask_BK: Tensor | None = None
    ) -> list[Answer]:
        """Answer rows greedily, with at most `limit` tokens.

        Raises:
            UserError: A row with its answer is longer than the model's positions.
        """
        filled = [
            row.filled(vectors, self._filler)
            for row, vectors in zip(rows, real_vectors(mask_BK, len(rows)), strict=True)
        ]
        prompts, columns = [tokens for tokens, _ in filled], [columns for _, columns in filled]
        self._check_length(max(map(len, prompts)) + limit, f", {limit} of them for the answer (model.max_new_tokens)")
        parts = self.prompt.stop, vectors_BKD, columns, self.sites, self.static_cache
        return generate(self.model, self.tokenizer, prompts, limit, *parts)

    def _check_length(self, length: int, remark: str = "") -> None:
        if self.positions is not None and length > self.positions:
            raise UserError(
                f"model.target: a row takes {length} positions{remark}, and '{self.path}' has {self.positions}"
            )
