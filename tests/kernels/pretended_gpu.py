"""A pretended GPU, for which Triton compiles without having one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


@contextmanager
def pretended_gpu(launch: Callable[..., None]) -> Iterator[None]:
    """Pass launches to a function: three numbers of programs, stream, binary, Triton's own, and the arguments."""
    utils = SimpleNamespace(
        load_binary=lambda name, binary, shared, device: (None, hash(binary), 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 2**18},
    )
    gpu = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    gpu.get_current_stream, gpu.launcher_cls, gpu.utils = lambda device: 7, lambda source, metadata: launch, utils
    driver.set_active(gpu)
    yield
    driver.set_active(None)  # to be found again
