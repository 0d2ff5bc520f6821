"""The frozen source, which reads the question.

Shapes: B batch, T positions, S positions of the question, C width of the states.
"""

from collections.abc import Sequence
from typing import NotRequired, TypedDict, cast

import torch
from lightning import Trainer
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from datamodules.errors import UserError
from lightning_modules.pretrained.fingerprint import fingerprint
from lightning_modules.pretrained.first_layers import FirstLayers
from lightning_modules.pretrained.key_values import FirstKeyValues
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.pretrained.positions import positions
from lightning_modules.pretrained.prompts import (
    CHAT,
    QUESTION,
    Prompt,
    added_tokens,
    behind,
    check_tokens,
    pad,
    with_added,
)
from lightning_modules.telepathy.frozen import Frozen
from lightning_modules.telepathy.source_cache import SourceCache


class SourceBatch(TypedDict):
    """Questions in tokens of the source.

    Attributes:
        source: The tokens of prompt and question with the special tokens around them, [B, T].
        source_real: True at real tokens of `source`, [B, T].
        source_place: The positions of the question's tokens in `source`, [B, S].
        source_mask: True at real positions of the question, [B, S].
        states: The states at these positions, [B, S, C], where they come from files.
    """

    source: Tensor
    source_real: Tensor
    source_place: Tensor
    source_mask: Tensor
    states: NotRequired[Tensor]


class Source(Frozen):
    """A frozen model, decoder or encoder, of which the hidden states at the question are read.

    Args:
        pretrained: The model to load.
        layers: The layers to read, counted from 1; their states are concatenated.
        prompt: The text around the question, or `chat`, of which the source reads the part before the question. A
            source without a chat template reads the question alone.

    Attributes:
        model: Reads the states of the model, which ends with the last of `layers`.
        tokenizer: Its tokenizer.
        before: The text before the question.
        added: The special tokens before and behind the text.
        width: Number of features C of the states.
        cache: The files with the states, once they have taken the place of the model.

    Raises:
        UserError: The model cannot be loaded or has no such layer, or the prompt has no place for a question.
    """

    model: FirstLayers | FirstKeyValues

    def __init__(self, pretrained: Pretrained, layers: list[int], prompt: str):
        super().__init__(first := pretrained.load_first_layers(layers))
        self.path = pretrained.path
        self.tokenizer = tokenizer = pretrained.load_tokenizer()
        self.width = first.width
        self.cache: SourceCache | None = None
        self.positions = positions(self.model.model)
        self._vocabulary = len(cast(Tensor, self.model.model.get_input_embeddings().weight))
        if prompt == CHAT and tokenizer.chat_template:
            whole = Prompt.chat(tokenizer, self.path)
        else:
            whole = Prompt(QUESTION if prompt == CHAT else prompt, "model.source_prompt or model.prompt")
        self.before = whole.before
        self.added = ([], []) if whole.has_special_tokens else added_tokens(tokenizer)

    def read_key_values(self) -> list[int]:
        """Let the states be the keys and values of the layers from now on, and return each layer's number of features.

        Raises:
            UserError: The model's keys cannot be read without their positions.
        """
        assert isinstance(self.model, FirstLayers)
        self.model = FirstKeyValues(self.model, self.path).eval()
        self.width = self.model.sites.width
        return self.model.sites.layer_widths

    def tokenize(self, questions: Sequence[str]) -> SourceBatch:
        """Return questions in tokens, with their states where these are in files.

        Raises:
            UserError: As `tokens` does, or the files have no states of a question.
        """
        batch = self.tokens(questions)
        if self.cache is not None:
            batch["states"] = self.cache.read(questions)
        return batch

    def tokens(self, questions: Sequence[str]) -> SourceBatch:
        """Return questions in tokens alone.

        Raises:
            UserError: A question has no token, or a row is longer than the model's positions.
        """
        rows, places, counts = [], [], []
        before, after = self.added
        for question, tokens, start in zip(questions, *behind(self.tokenizer, self.before, questions), strict=True):
            row = with_added(tokens, before)
            places.append(len(row) - len(tokens) + start)
            counts.append(len(tokens) - start)
            if not counts[-1]:
                raise UserError(f"model.source: the tokenizer of '{self.path}' has no token for {question[:40]!r}")
            rows.append(row + after)
            if self.positions is not None and len(rows[-1]) > self.positions:
                raise UserError(
                    f"model.source: the question {question[:40]!r}... takes {len(rows[-1])} positions with its prompt, "
                    f"and '{self.path}' has {self.positions}"
                )
        check_tokens(rows, self._vocabulary, "model.source", self.path)
        filler = self.tokenizer.pad_token_id or 0
        source_BT, source_real_BT = pad(rows, filler if filler < self._vocabulary else 0)
        offset_S = torch.arange(max(counts))
        source_mask_BS = offset_S < torch.tensor(counts)[:, None]
        # Beyond the end of a question its first position is read again, and masked
        source_place_BS = torch.tensor(places)[:, None] + offset_S * source_mask_BS
        return SourceBatch(
            source=source_BT, source_real=source_real_BT, source_place=source_place_BS, source_mask=source_mask_BS
        )

    def read(self, batch: SourceBatch) -> Tensor:
        """Return the states_BSC of the question in fp32, without those of the prompt and of special tokens."""
        return (batch["states"] if "states" in batch else self._states(batch)).float()

    @torch.no_grad()
    def _states(self, batch: SourceBatch) -> Tensor:
        states_BTC: Tensor = self(batch["source"], batch["source_real"])
        place_BS1 = batch["source_place"][..., None]
        return states_BTC.gather(1, place_BS1.expand(-1, -1, states_BTC.shape[-1]))

    def move_to_files(self, questions: Sequence[str], trainer: Trainer) -> None:
        """Write the states at all questions of a data set to files, and free the model; see `SourceCache`.

        From then on `tokenize` adds the states to its batches. Every rank must call it. A second call with the same or
        fewer questions does nothing.

        Raises:
            UserError: The model has been freed, and has not read all of these questions.
        """
        if self.cache is not None and all(question in self.cache for question in questions):
            return
        if self.cache is not None:
            raise UserError("model.cache_source: the source was freed in an earlier fit, on other data")
        plugin, device = trainer.precision_plugin, trainer.strategy.root_device
        model = plugin.convert_module(self.model.to(device))
        batch = self.tokenize(questions)
        identity = {
            "weights": fingerprint(model, self.model.model.config),
            "layers": self.model.layers,
            "precision": str(trainer.precision),
        }
        rows = [row[real].tolist() for row, real in zip(batch["source"], batch["source_real"], strict=True)]
        cache = SourceCache(identity, questions, rows, batch["source_mask"].sum(1).tolist(), self.width)

        def states(some: Sequence[str]) -> list[Tensor]:
            batch = move_data_to_device(self.tokenize(some), device)
            with plugin.val_step_context():
                return [row[real] for row, real in zip(self._states(batch), batch["source_mask"], strict=True)]

        cache.fill(states, trainer.global_rank, trainer.world_size)
        self.cache, self.model = cache, cast(FirstLayers, nn.Module())
