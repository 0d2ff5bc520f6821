"""The decoder of the groundthink line, which can read a row in pieces.

Shapes: B batch, T positions, D width, V vocabulary.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from lightning_modules.core.block import Factory
from lightning_modules.core.decoder import Decoder, DecoderState
from lightning_modules.mixers.gated_delta import GatedDelta
from lightning_modules.mixers.key_bank import Bank, KeyBank, RowTokens
from lightning_modules.mixers.keys import KeyPlaces, Keys
from lightning_modules.mixers.recall import Recall
from lightning_modules.mixers.swiglu import SwiGLU
from lightning_modules.mixers.window_attention import WindowAttention
from lightning_modules.mixers.writes import Writes


class Hybrid(Decoder):
    """A decoder whose mixers carry a state from one piece of a row to the next.

    Args:
        tokens: Where mixers find the tokens of a forward.
        writes: What mixers measure of their writes.
        piece_len: Positions that a forward of evaluation reads at once; None for whole rows.
        leaks: Mixers read the state after the last position, so a row cannot be cut.
        tied: The unembedding has the weights of the token embedding.
        *parts: The arguments of `Decoder`, without positions.
    """

    def __init__(self, tokens: RowTokens, writes: Writes, piece_len: int | None, leaks: bool, tied: bool, *parts: Any):
        super().__init__(*parts)
        if tied:
            self.unembed.weight = self.token_embedding.weight
        self.tokens, self.writes, self.piece_len, self.leaks = tokens, writes, piece_len, leaks

    def forward(
        self, tokens_BT: Tensor, with_residual: bool = False, with_logits: bool = True, with_writes: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs of `Decoder`; with `with_writes` also overlap and mean beta, scalars, from `Writes`."""
        plain = with_logits and not with_residual and not with_writes
        if self.piece_len and plain and not self.training and not self._hooked():
            return self._by_pieces(tokens_BT, self.piece_len)
        if not with_writes:
            return super().forward(tokens_BT, with_residual, with_logits)
        self.writes.open()
        outputs = super().forward(tokens_BT, with_residual, with_logits)
        return *(outputs if isinstance(outputs, tuple) else (outputs,)), *self.writes.close()

    def stream(self, tokens_BT: Tensor) -> Tensor:
        """Return the stream at `final_residual`, [B, T, D]."""
        self.tokens.tokens_BT = tokens_BT
        x_BTD = super().stream(tokens_BT)
        self.tokens.tokens_BT = None
        return x_BTD

    def init_state(self, batch: int) -> DecoderState:
        """Return the state before the first position.

        Raises:
            UserError: A mixer reads the state after the last position, or a callback has a hook on the network.
        """
        if self.leaks:
            raise UserError(
                "model.reproduce_flaws: with final_state each position reads the state after the last one, so the "
                "model cannot generate or read a row in pieces"
            )
        return super().init_state(batch)

    def extend(self, tokens_BT: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Return logits_BTV at the next T positions, and the state after them."""
        self.tokens.tokens_BT = tokens_BT
        x_BTD, mixers = self.embedding(self.token_embedding(tokens_BT)), []
        for block, before in zip(self._blocks(), state.mixers, strict=True):
            x_BTD, after = block.extend(x_BTD, before)
            mixers.append(after)
        self.tokens.tokens_BT = None
        logits_BTV: Tensor = self.unembed(self.final_norm(self.final_residual(x_BTD)))
        return logits_BTV, DecoderState(state.position + tokens_BT.shape[1], mixers)

    def step(self, token_B: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Return logits_BV at the next position, and the state after it."""
        logits_B1V, state = self.extend(token_B[:, None], state)
        return logits_B1V[:, 0], state

    def _by_pieces(self, tokens_BT: Tensor, piece_len: int) -> Tensor:
        state, logits = self.init_state(len(tokens_BT)), []
        for first in range(0, tokens_BT.shape[1], piece_len):
            logits_BTV, state = self.extend(tokens_BT[:, first : first + piece_len], state)
            logits.append(logits_BTV)
        return torch.cat(logits, 1)

    def _hooked(self) -> bool:
        return any(module._forward_hooks for module in self.modules())


def make_hybrid(
    vocab_size: int,
    width: int,
    heads: int,
    pattern: str,
    window: int,
    mlp_width: int,
    keys: Keys,
    rotary_keys: bool,
    key_bank: KeyBank | None,
    recall: Literal["none", "causal", "final"],
    overlap: Literal["squared", "absolute"],
    piece_len: int | None,
    tied: bool,
    delta_options: dict[str, Any],
) -> Hybrid:
    """Return a decoder with RMSNorm, SwiGLU and the mixers of the pattern; see `GroundThink` for the arguments.

    Args:
        vocab_size: V.
        width: D.
        heads: Heads of each mixer.
        pattern: The pattern.
        window: Positions that window attention sees.
        mlp_width: Hidden units of the SwiGLU; 0 for none.
        keys: What keys hold.
        rotary_keys: Rotary positions in queries and keys of the delta rule.
        key_bank: Markers.
        recall: Whether window attention reads the state, and whether that is the state after the last position.
        overlap: Form of the overlap of keys.
        piece_len: Positions that a forward of evaluation reads at once.
        tied: The unembedding has the weights of the token embedding.
        delta_options: More arguments of `GatedDelta`.
    """
    tokens, writes = RowTokens(), Writes(overlap)
    sizes = {name: delta_options[name] for name in ("key_width", "value_width")}

    def delta(read: Recall | None) -> nn.Module:
        bank = Bank(heads, sizes["key_width"], key_bank, tokens) if key_bank else None
        places = KeyPlaces(keys, rotary_keys, bank)
        return GatedDelta(width, heads, places=places, recall=read, writes=writes, **delta_options)

    mixers: list[Factory] = []
    read: Recall | None = None
    for letter in pattern:
        if letter == "G":
            read = None if recall == "none" else Recall(**sizes, final=recall == "final")
            mixers.append(partial(delta, read))
        else:
            mixers.append(partial(WindowAttention, width, heads, window, read))
    mlp, norm = partial(SwiGLU, width, mlp_width) if mlp_width else None, partial(nn.RMSNorm, eps=1e-6)
    return Hybrid(tokens, writes, piece_len, recall == "final", tied, vocab_size, width, mixers, mlp, norm)
