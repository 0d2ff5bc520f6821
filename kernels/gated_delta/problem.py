"""The sizes of one call of the kernels, what all of them get as arguments, and the tensors that they fill.

Shapes: as in `reference.py`; `slots` chunks of C positions, as `tiles.py` counts them.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.gated_delta.configurations import Launch, configuration

Tensors = tuple[Tensor, ...]
NARROWEST = 16  # columns: the least of a product


class Problem:
    """The sizes of one call, and the arguments that all kernels share.

    Args:
        k: Keys [B, T, H, K].
        v: Values [B, T, J, V].
        cu_seqlens: Bounds of the sequences, or None.
        normalise: Whether queries and keys are normalised.
        negative: Whether betas may exceed 1, so that the state has negative eigenvalues.
    """

    def __init__(self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, normalise: bool, negative: bool):
        self.B, self.T, self.H, self.K = k.shape
        self.J, self.V = v.shape[-2:]
        self.normalise, self.device = normalise, k.device
        gpu = torch.cuda.get_device_properties(k.device) if k.is_cuda else None
        major, self.multiprocessors = (gpu.major, gpu.multi_processor_count) if gpu else (0, 1)
        self.how = configuration(major, k.dtype == torch.bfloat16, self.K, negative)
        self.C = self.how.chunk
        if cu_seqlens is None:
            self.N, self.slots = self.B, self.B * -(-self.T // self.C)
        else:
            self.N = cu_seqlens.shape[0] - 1
            self.slots = self.T // self.C + self.N
        self.common = {"T": self.T, "H": self.H, "J": self.J, "K": self.K, "BK": _tile(self.K), "C": self.C}
        self.common |= {"NORM": normalise, "PACKED": cu_seqlens is not None}

    def columns(self, launch: Launch) -> int:
        """Return the columns of V that a program of a kernel treats at once."""
        return min(launch.columns, _tile(self.V))

    def blocks(self, launch: Launch) -> int:
        """Return the number of programs that share the columns of V."""
        return -(-self.V // self.columns(launch))

    def fill(self, launch: Launch, directions: int) -> tuple[int, Launch]:
        """Return the programs of a sweep, and its launch, with columns so narrow that no multiprocessor is idle."""
        sweeps = directions * self.N * self.J
        while launch.columns > NARROWEST and sweeps * self.blocks(launch) < self.multiprocessors:
            launch = replace(launch, columns=self.columns(launch) // 2)
        return sweeps * self.blocks(launch), launch

    def run(self, kernel: Any, programs: int, launch: Launch, *tensors: Tensor | None, **options: object) -> None:
        """Launch `programs` programs of a kernel; a tensor that it does not read may be None."""
        if programs == 0:
            return
        if launch.columns:
            options |= {"V": self.V, "BV": self.columns(launch)}
        how = {"num_warps": launch.warps, "num_stages": launch.stages}
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            kernel[(programs,)](*tensors, **options, **self.common, **how)

    def forward_buffers(self, v: Tensor, output_final_state: bool) -> Tensors:
        """Return o, the final state, A, c and the factors of the l2 norms of queries and keys, without content."""
        slots, J, C, parts = self.slots, self.J, self.C, self.how.parts
        norms = (slots, self.H, C) if self.normalise else (0,)
        return (
            self.row_buffer(v),
            v.new_empty((self.N, J, self.K, self.V) if output_final_state else (0,), dtype=torch.float32),
            v.new_empty((slots, J, 2 if parts == 2 else 1, C, C), dtype=v.dtype if parts else torch.float32),
            v.new_empty((slots, J, C), dtype=torch.float32),
            v.new_empty(norms, dtype=torch.float32),
            v.new_empty(norms, dtype=torch.float32),
        )

    def backward_buffers(self, k: Tensor, v: Tensor, initial: Tensor | None) -> Tensors:
        """Return the gradients of q and k per value head, of v, g, beta and of the initial state, without content."""
        J, K = self.J, self.K
        wide = k.dtype if self.H == J else torch.float32  # the sum over the value heads of a group follows
        gates = (self.B, self.T, J)
        return (
            self.row_buffer(k, (self.B, self.T, J, K), wide),
            self.row_buffer(k, (self.B, self.T, J, K), wide),
            self.row_buffer(v),
            self.row_buffer(v, gates, torch.float32),
            self.row_buffer(v, gates, torch.float32),
            v.new_empty((0,), dtype=torch.float32) if initial is None else torch.empty_like(initial),
        )

    def row_buffer(
        self, like: Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return a tensor for one result per row; rows after the last packed sequence stay zero."""
        make = like.new_zeros if self.common["PACKED"] else like.new_empty
        return make(like.shape if shape is None else shape, dtype=dtype)


def _tile(width: int) -> int:
    return max(1 << (width - 1).bit_length(), NARROWEST)
