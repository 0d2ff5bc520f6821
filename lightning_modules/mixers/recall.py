"""What a gated delta mixer hands to the window attention behind it, so that attention can read the recurrent state.

Shapes: B batch, T positions, H heads, K key width, V value width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_modules.mixers.rule import Written, run_rule

Read = Callable[[Tensor], Tensor]  # q_BTHK -> o_BTHV


class Recall:
    """Reads of the state at each position of the forward that is running.

    Args:
        key_width: K of the state.
        value_width: V of the state.
        final: Read the state after the last position instead, as the notes do. Each position then reads what later
            ones have written, so the model sees the answers that it is trained to predict.

    Attributes:
        readers: Mixers that read in each forward.
    """

    def __init__(self, key_width: int, value_width: int, final: bool = False) -> None:
        self.key_width, self.value_width, self.final = key_width, value_width, final
        self.readers = 0
        self._read: Read | None = None
        self._left = 0

    def offer(self, written: Written, before_BHKV: Tensor, after_BHKV: Tensor, site: nn.Module, negative: bool) -> None:
        """Let the readers of this forward read S_t^T q_t, where S_t has written t; with `final`, S_T^T q_t.

        Args:
            written: What each position writes.
            before_BHKV: The state before the first position.
            after_BHKV: The state after the last position.
            site: The site of the state; see `run_rule`.
            negative: Whether beta may exceed 1.
        """
        if not self.readers:
            return
        if self.final:
            nothing_BTH = torch.zeros_like(written[2])  # no decay and no write: the state stays as it is at the end
            written, before_BHKV = (*written[:2], nothing_BTH, nothing_BTH), after_BHKV
        self._read = lambda q_BTHK: run_rule(q_BTHK, written, before_BHKV, site, negative)[0]
        self._left = self.readers

    def __call__(self, q_BTHK: Tensor) -> Tensor:
        """Return what the queries read, [B, T, H, V]."""
        assert self._read is not None  # the mixer that offers comes first
        read = self._read
        self._left -= 1
        if not self._left:
            self._read = None  # frees the tensors of this forward
        return read(q_BTHK)
