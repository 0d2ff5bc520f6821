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
from lightning_modules.pretrained.answers import Answer
from lightning_modules.pretrained.causal_lm import (
    CHUNK,
    embedding_of,
    embedding_scale,
    logits_at,
    reads_ahead,
    recorded,
    vocabulary,
)
from lightning_modules.pretrained.generation import end_tokens, filler_token, generate
from lightning_modules.pretrained.key_values import key_values_of
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.pretrained.positions import positions
from lightning_modules.pretrained.prompts import CHAT, Prompt
from lightning_modules.telepathy.flaws import Flaw
from lightning_modules.telepathy.frozen import Frozen
from lightning_modules.telepathy.layout import Packing, Row, pack, real_vectors
from lightning_modules.telepathy.target_rows import TargetRows

if TYPE_CHECKING:
    from lightning_modules.pretrained.loading import CausalLM


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
        rows: Makes the rows that it reads.
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
        end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
        self._filler = filler_token(self.model, tokenizer)
        self.rows = TargetRows(tokenizer, self.prompt, end, vocabulary(self.model), self.path, flaws)

    @property
    def width(self) -> int:
        """Width D of a vector: that of the embedding's output, or of all keys and values together."""
        return self.sites.width

    @property
    def embedding(self) -> torch.nn.Embedding:
        """The input embedding."""
        return self.model.get_input_embeddings()

    def take_key_values(self) -> list[int]:
        """Let vectors be keys and values of all layers from now on, and return each layer's number of features.

        Raises:
            UserError: The model's keys hold positions, or it passes more than keys and values from token to token.
        """
        self.sites = sites = key_values_of(self.model, self.path)
        return sites.layer_widths

    def scale(self) -> float:
        """Return the root mean square of the vectors of a text: of its embeddings, or of its standardised keys."""
        return 1.0 if self.takes_key_values else embedding_scale(self.model)

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
        head = self.rows.head
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
        rows = self.rows.soft(["x", "x y"], ["x", "y"])
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
