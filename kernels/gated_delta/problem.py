"""The sizes of one call of the kernels, what all of them get as arguments, and the tensors that they fill.

Shapes: as in `reference.py`; `slots` chunks of C positions, as `tiles.py` counts them.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.call import Call
from kernels.gated_delta.configurations import Launch, configuration
from kernels.gated_delta.tiles import FACTOR_COUNT

Tensors = tuple[Tensor, ...]
Sizes = tuple[torch.Size, torch.Size, int | None, torch.dtype, torch.device, bool, bool]
NARROWEST = 16  # columns: the least of a product
WARPS = (
    7  # of a multiprocessor, which has registers for eight; so that 128 programs of eight are enough for 132 of them
)


class Problem:
    """The sizes of one call, and the arguments that all kernels share.

    Args:
        keys: Shape of the keys [B, T, H, K].
        values: Shape of the values [B, T, J, V].
        sequences: The number of packed sequences, or None.
        dtype: Type of the keys.
        device: Where they are.
        normalise: Whether queries and keys are normalised.
        negative: Whether betas may exceed 1, so that the state has negative eigenvalues.
    """

    def __init__(
        self,
        keys: torch.Size,
        values: torch.Size,
        sequences: int | None,
        dtype: torch.dtype,
        device: torch.device,
        normalise: bool,
        negative: bool,
    ):
        self.B, self.T, self.H, self.K = keys
        self.J, self.V = values[-2:]
        self.normalise, self.device, self.packed = normalise, device, sequences is not None
        gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        major, self.multiprocessors = (gpu.major, gpu.multi_processor_count) if gpu else (0, 1)
        self.how = configuration(major, dtype == torch.bfloat16, self.K, negative)
        self.C = self.how.chunk
        if sequences is None:
            self.N, self.slots = self.B, self.B * -(-self.T // self.C)
        else:
            self.N = sequences
            self.slots = self.T // self.C + self.N
        self.common = {"N": self.N, "T": self.T, "H": self.H, "J": self.J, "K": self.K, "V": self.V}
        self.common |= {"BK": _tile(self.K), "C": self.C, "PARTS": self.how.parts}
        self.common |= {"NORM": normalise, "PACKED": self.packed}

    def columns(self, launch: Launch) -> int:
        """Return the columns of V that a program of a kernel treats at once."""
        return min(launch.columns, _tile(self.V))

    def blocks(self, launch: Launch) -> int:
        """Return the number of programs that share the columns of V."""
        return -(-self.V // self.columns(launch))

    def fill(self, launch: Launch, directions: int) -> tuple[int, Launch]:
        """Return the programs of a sweep, and its launch, with fewer columns where a GPU would have too few warps."""
        sweeps = directions * self.N * self.J
        while launch.columns > NARROWEST and sweeps * self.blocks(launch) * launch.warps < WARPS * self.multiprocessors:
            columns = max(self.columns(launch) // 2, NARROWEST)
            launch = replace(launch, columns=columns, warps=min(launch.warps, max(columns // 16, 4)))
        return sweeps * self.blocks(launch), launch

    def call(self, kernel: Any, programs: int, launch: Launch, options: dict[str, Any]) -> Call:
        """Return a launch of `programs` programs of a kernel, with options that not all kernels have."""
        how = {"num_warps": launch.warps, "num_stages": launch.stages}
        return Call(kernel, programs, how, self.common | {"BV": self.columns(launch)} | options)

    def forward_buffers(self, v: Tensor, output_final_state: bool) -> Tensors:
        """Return o, the final state, A, P and the factors, without content."""
        slots, J, C, parts = self.slots, self.J, self.C, self.how.parts
        return (
            self.rows_like(v),
            v.new_empty((self.N, J, self.K, self.V) if output_final_state else (0,), dtype=torch.float32),
            v.new_empty((slots, J, 2 if parts == 2 else 1, C, C), dtype=v.dtype if parts else torch.float32),
            v.new_empty((slots, J, C, C), dtype=v.dtype if parts else torch.float32),
            v.new_empty((slots, J, FACTOR_COUNT.value, C), dtype=torch.float32),
        )

    def backward_buffers(self, k: Tensor, v: Tensor, beta: Tensor, initial: Tensor | None) -> Tensors:
        """Return the gradients of q and k per value head, of v, g, beta and of the initial state, without content."""
        if self.H == self.J:
            dq, dk = self.rows_like(k), self.rows_like(k)
        else:  # the sum over the value heads of a group follows
            make = k.new_zeros if self.packed else k.new_empty
            dq, dk = (make((self.B, self.T, self.J, self.K), dtype=torch.float32) for _ in range(2))
        return (
            dq,
            dk,
            self.rows_like(v),
            self.rows_like(beta, torch.float32),
            self.rows_like(beta, torch.float32),
            v.new_empty((0,), dtype=torch.float32) if initial is None else torch.empty_like(initial),
        )

    def rows_like(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor for one result per row; rows after the last packed sequence stay zero."""
        return torch.zeros_like(x, dtype=dtype) if self.packed else torch.empty_like(x, dtype=dtype)


def sizes_of(k: Tensor, v: Tensor, cu_seqlens: Tensor | None, normalise: bool, negative: bool) -> Sizes:
    """Return the arguments of `Problem` for keys [B, T, H, K], values [B, T, J, V] and bounds of sequences, or None."""
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return k.shape, v.shape, sequences, k.dtype, k.device, normalise, negative


def _tile(width: int) -> int:
    return max(1 << (width - 1).bit_length(), NARROWEST)
