"""The sizes of one call of the kernels, what both of them get as arguments, and the tensors that they fill.

Shapes: as in `forward.py`; `slots` tiles of C rows, as `kernels.gated_delta.tiles` counts them.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.call import Call
from kernels.phase_scan.configurations import TABLE, Configuration, Launch, window_tiles
from kernels.phase_scan.options import EPSILON

Tensors = tuple[Tensor, ...]
Kinds = tuple[tuple[torch.Size, torch.dtype, torch.device] | None, ...]


class Problem:
    """The sizes of one call, and the arguments that both kernels share.

    Args:
        inputs: Shape, type and device, or None, of x, omega, mass, log-decay, read offset, write offset, initial states
            and bounds of the sequences.
        normalise: Whether outputs are divided by the sum of masses.
        imaginary: Whether there are imaginary parts of outputs.
        window: Positions that the sum covers, or None.
    """

    def __init__(self, inputs: Kinds, normalise: bool, imaginary: bool, window: int | None = None):
        x, _, mass, log_decay, read_offset, write_offset, _, bounds = inputs
        assert x is not None
        (self.B, self.T, self.D), dtype, self.device = x
        self.packed, on_gpu = bounds is not None, self.device.type == "cuda"
        self.width, self.parts = self.D * (1 + imaginary), 2 + normalise
        extras = normalise + sum(v is not None for v in (mass, log_decay, read_offset, write_offset))
        per_channel = log_decay is not None and len(log_decay[0]) == 1
        one = "channel" if per_channel else "mass" if mass is not None else "one"
        kind = ("plain", one, "more")[min(extras, 2)]
        self.how = TABLE[dtype.itemsize, kind if window is None else "window"]
        self.N = self.B if bounds is None else bounds[0][0] - 1
        self.common: dict[str, Any] = {"T": self.T, "D": self.D, "IMAGINARY": imaginary}
        self.common |= {"PACKED": self.packed, "COMPILED": on_gpu}
        if window is not None:
            self._set_window(window)
            return
        rows = self.how.backward.tile
        self.slots = self.T // rows + self.N if self.packed else self.B * -(-self.T // rows)
        self.common |= {"EPSILON": EPSILON, "PER_CHANNEL": per_channel, "NORM": normalise, "KEEP": rows}

    def _set_window(self, window: int) -> None:
        """Choose the tiles for a window; before each, two sums and two phases are kept. See `window_tiles.py`."""
        self.parts = 3
        forward, rows, tiles = window_tiles(self.how.forward, window)
        backward, _, _ = window_tiles(self.how.backward, window)
        self.how = Configuration(forward, backward)
        self.common |= {"W": window, "L": rows, "Q": tiles}
        if self.packed:
            self.slots = (self.T * tiles // window if tiles > 1 else self.T // rows) + 2 * self.N
        elif tiles > 1:
            self.slots = self.B * (self.T // window * tiles + -(-(self.T % window) // rows))
        else:
            self.slots = self.B * (min(self.T, 1) + -(-max(self.T - window, 0) // rows))

    def call(self, kernel: Any, launch: Launch, **options: object) -> Call:
        """Return a launch of a program per sequence and block of channels."""
        channels = min(launch.channels, max(4, 1 << (self.D - 1).bit_length()))
        even = not self.packed and self.T % launch.tile == 0  # the last tile, too, has all its rows
        options |= {"R": launch.rows, "G": launch.groups, "BD": channels, "STAGES": launch.stages, "EVEN": even}
        return Call(kernel, self.N * -(-self.D // channels), {"num_warps": launch.warps}, options | self.common)

    def forward_buffers(self, x: Tensor, output_final_state: bool) -> Tensors:
        """Return outputs, final states, and states and phases before each tile, without content."""
        return (
            self._rows(x, self.width),
            x.new_empty(self.N if output_final_state else 0, self.parts, self.D, dtype=torch.float32),
            x.new_empty(self.slots, self.parts + 1, self.D, dtype=torch.float32),
        )

    def backward_buffers(self, x: Tensor, *inputs: Tensor | None) -> Tensors:
        """Return the gradients of x, omega, mass, log-decay, read and write offset and initial states, no content.

        The gradient of a log-decay per channel is one row per sequence. Those of inputs that are None are empty.
        """
        omega, mass, log_decay, read_offset, write_offset, initial = inputs
        empty = x.new_empty(0)
        rows = [empty if v is None else self._rows(v, self.D) for v in (omega, mass, read_offset, write_offset)]
        if log_decay is None:
            decay = empty
        elif log_decay.dim() == 1:
            decay = x.new_empty(self.N, self.D, dtype=torch.float32)
        else:
            decay = self._rows(log_decay, self.D)
        states = empty if initial is None else torch.empty_like(initial)
        return self._rows(x, self.D), rows[0], rows[1], decay, rows[2], rows[3], states

    def _rows(self, like: Tensor, width: int) -> Tensor:
        """Return a tensor for one result per row; rows after the last packed sequence stay zero."""
        make = like.new_zeros if self.packed else like.new_empty
        return make(self.B, self.T, width)


def kinds_of(*inputs: Tensor | None) -> Kinds:
    """Return shape, type and device of each tensor: all that a launch depends on but the addresses."""
    return tuple([None if x is None else (x.shape, x.dtype, x.device) for x in inputs])
