"""A kernel that is launched again and again with arguments that differ in nothing but addresses."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import or_
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

ALIGNED = 16  # bytes: Triton compiles a kernel for addresses that are multiples of it, and another one for others
KEPT = 256  # plans of the last sizes: to make one takes longer than to launch it


class Call:
    """A launch of a kernel, complete but for its tensors.

    Triton looks at each argument of a launch to find the kernel that it compiled for such arguments, which takes the
    CPU about as long as a small kernel takes the GPU. Here only addresses change, so the kernel found once is launched
    directly, as in Triton's tutorial on fused softmax. Tensors whose addresses are not aligned go through Triton's
    search, and so do all tensors in its interpreter.

    Args:
        kernel: The kernel; its first arguments are tensors.
        programs: How many programs of it run.
        how: Triton's options, such as `num_warps`.
        constants: The other arguments of the kernel, by name; names that it does not have are left out.
    """

    def __init__(self, kernel: Any, programs: int, how: dict[str, int], constants: dict[str, Any]):
        self.kernel, self.programs, self.how = kernel, programs, how
        self.constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self._launch: Callable[..., object] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch the kernel.

        Args:
            tensors: Of the same types and on the same device at each call, and None at the same places; the kernel does
                not read those.
        """
        if self.programs == 0:
            return
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        aligned = reduce(or_, addresses) % ALIGNED == 0
        if aligned and self._launch is not None:
            self._launch(*addresses, *self.constants.values())
            return
        compiled = self.kernel[(self.programs,)](*tensors, **self.constants, **self.how)
        if aligned and compiled is not None:
            self._launch = compiled[(self.programs, 1, 1)]


def compile_together(calls: Iterable[tuple[Call, Sequence[torch.dtype | None]]]) -> None:
    """Compile kernels side by side, for tensors of these types: given the cores, it takes as long as the slowest one.

    Kernels that are compiled already cost nothing.
    """
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        for call, types in calls:
            call.kernel.warmup(*types, grid=(1,), **call.constants, **call.how)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a device is the current one, as launches on it need it."""
    return torch.cuda.device(device.index) if device.type == "cuda" else nullcontext()
