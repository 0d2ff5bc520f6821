"""What a gated delta mixer hands to the window attention behind it, so that attention can read the recurrent state.

Shapes: B batch, T positions, H heads, K key width, V value width.
"""

from collections.abc import Callable

from torch import Tensor

Read = Callable[[Tensor], Tensor]  # q_BTHK -> o_BTHV


class Recall:
    """Reads of the state at each position of the forward that is running.

    Args:
        key_width: K of the state.
        value_width: V of the state.

    Attributes:
        readers: Mixers that read in each forward.
    """

    def __init__(self, key_width: int, value_width: int) -> None:
        self.key_width, self.value_width = key_width, value_width
        self.readers = 0
        self._read: Read | None = None
        self._left = 0

    def offer(self, read: Read) -> None:
        """Let the readers of this forward read; `read` maps queries_BTHK to S_t^T q_t, where S_t has written t."""
        if self.readers:
            self._read, self._left = read, self.readers

    def __call__(self, q_BTHK: Tensor) -> Tensor:
        """Return what the queries read, [B, T, H, V]."""
        assert self._read is not None  # the mixer that offers comes first
        read = self._read
        self._left -= 1
        if not self._left:
            self._read = None  # frees the tensors of this forward
        return read(q_BTHK)
