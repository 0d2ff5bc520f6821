"""The sizes of one call of the kernels, what both of them get as arguments, and the tensors that they fill.

Shapes: as in `forward.py`; `slots` tiles of C rows, as `kernels.gated_delta.tiles` counts them.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from kernels.phase_scan.configurations import TABLE, WINDOW, Configuration, Launch, window_tiles
from kernels.phase_scan.options import EPSILON

Tensors = tuple[Tensor, ...]


class Problem:
    """The sizes of one call, and the arguments that both kernels share.

    Args:
        x: Values [B, T, D].
        mass: Factors of the values, or None.
        log_decay: Log-decays [D] or [B, T, D], or None.
        read_offset: Phases added where it reads, or None.
        write_offset: Phases added where it writes, or None.
        cu_seqlens: Bounds of the sequences, or None.
        normalise: Whether outputs are divided by the sum of masses.
        imaginary: Whether there are imaginary parts of outputs.
        window: Positions that the sum covers, or None.
    """

    def __init__(
        self,
        x: Tensor,
        mass: Tensor | None,
        log_decay: Tensor | None,
        read_offset: Tensor | None,
        write_offset: Tensor | None,
        cu_seqlens: Tensor | None,
        normalise: bool,
        imaginary: bool,
        window: int | None = None,
    ):
        self.B, self.T, self.D = x.shape
        self.device, self.packed = x.device, cu_seqlens is not None
        self.width, self.parts = self.D * (1 + imaginary), 2 + normalise
        extras = normalise + sum(v is not None for v in (mass, log_decay, read_offset, write_offset))
        self.how = TABLE[x.element_size(), min(extras, 2) if window is None else WINDOW]
        self.N = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.common: dict[str, Any] = {"T": self.T, "D": self.D, "IMAGINARY": imaginary}
        self.common |= {"PACKED": self.packed, "COMPILED": x.is_cuda}
        if window is not None:
            self._set_window(window)
            return
        rows = self.how.forward.rows * self.how.forward.groups
        self.slots = self.T // rows + self.N if self.packed else self.B * -(-self.T // rows)
        per_channel = log_decay is not None and log_decay.dim() == 1
        self.common |= {"EPSILON": EPSILON, "PER_CHANNEL": per_channel, "NORM": normalise}

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

    def run(self, kernel: Any, launch: Launch, *tensors: Tensor | None, **options: object) -> None:
        """Launch a program per sequence and block of channels; a tensor that the kernel does not read may be None."""
        channels = min(launch.channels, max(4, 1 << (self.D - 1).bit_length()))
        programs = self.N * -(-self.D // channels)
        if programs == 0:
            return
        options |= {"R": launch.rows, "G": launch.groups, "BD": channels, "STAGES": launch.stages}
        options["num_warps"] = launch.warps
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            kernel[(programs,)](*tensors, **options, **self.common)

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
