"""Times of calls on a GPU or a CPU, for the benchmarks of kernels."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call."""
    for _ in range(min(10, repeats)):
        run()
    times: list[float] = []
    event: Any = torch.cuda.Event
    for _ in range(repeats):
        if DEVICE == "cpu":
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
            continue
        start, end = (event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def graph_milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median time of a replay as a CUDA graph; NaN if the call cannot be captured, or on a CPU."""
    if DEVICE == "cpu":
        return float("nan")
    graph, stream = torch.cuda.CUDAGraph(), torch.Stream("cuda")
    try:
        torch.cuda.synchronize()
        with stream:
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return float("nan")
    return milliseconds(graph.replay, repeats)


def copy_rate() -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.empty(2**28 if DEVICE == "cuda" else 2**22, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source), 30) / 1e3)


def host_milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median time until a call returns on a GPU that is idle before; NaN on a CPU."""
    if DEVICE == "cpu":
        return float("nan")
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)
