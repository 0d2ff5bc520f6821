"""The Triton kernels in Triton's interpreter, beside the definition in fp64.

The interpreter has to be on before Triton is imported, so all of this runs in one other process. It shows that the
arithmetic is right, not what a compiler makes of it: `benchmarks/gated_delta_check.py` does that on a GPU.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap
from toy_gated_delta import Toy

from kernels.gated_delta import chunk_gated_delta_rule, recurrent_gated_delta_rule
from kernels.gated_delta.configurations import Launch, configuration
from kernels.gated_delta.problem import Problem, sizes_of

F32, F16 = torch.float32, torch.float16


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable]:
    """Return a function that calls another one in a process with the interpreter."""
    with pytest.MonkeyPatch.context() as environment, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        environment.setenv("TRITON_INTERPRET", "1")
        yield lambda call, *arguments: pool.submit(call, *arguments).result()


def relative_errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Return an error per tensor; that of a NaN is infinite, which `max` does not overlook."""
    pairs = zip(found, expected, strict=True)
    errors = [(x.double() - y).norm() / y.norm().clamp(min=1e-100) for x, y in pairs]
    return [float(error.nan_to_num(torch.inf)) for error in errors]


def results(rule: Callable, inputs: list[Tensor], *arguments: object, **options: object) -> list[Tensor]:
    """Return outputs, final states and all gradients of a function of both."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    o, final = rule(*inputs[:5], 0.3, inputs[5], True, *arguments, **options)
    loss = o.double().sin().sum() + final.double().sin().sum()
    return [o, final, *torch.autograd.grad(loss, inputs)]


def kernel_errors(toy: Toy, hopper: bool) -> list[float]:
    """Compare the kernels with the definition, with the configuration of Hopper for bf16 or that of another GPU."""
    from kernels.gated_delta import launch, problem

    launch.plan_forward.cache_clear()
    launch.plan_backward.cache_clear()
    problem.configuration = lambda major, half, *rest: configuration(9 * hopper, half or hopper, *rest)
    inputs, negative = toy.inputs(), toy.beta is None or toy.beta > 1
    options = {"allow_negative_eigenvalues": negative, "backend": "triton"}
    found = results(chunk_gated_delta_rule, inputs, not toy.unit, toy.cu_seqlens, **options)
    wide = [x.double() for x in inputs]
    return relative_errors(found, results(recurrent_gated_delta_rule, wide, not toy.unit, toy.cu_seqlens))


@pytest.mark.parametrize(
    ("toy", "hopper", "most"),
    [
        (Toy(T=37, J=1, K=20, V=36, unit=False, dtype=F32), False, 2e-6),
        (Toy(B=1, T=70, H=2, J=4, K=16, V=16, bounds=(0, 0, 5, 40, 65, 65), unit=False, dtype=F32), False, 2e-6),
        (Toy(B=1, T=96, J=1, K=16, V=16, decay=20.0, dtype=F32), False, 4e-6),
        (Toy(B=1, T=66, J=1, K=36, V=20, decay=50.0, beta=2.0, unit=False, dtype=F16), False, 1e-2),
        (Toy(B=1, T=70, K=36, V=16, decay=1e4, beta=0.0, dtype=F16, bounds=(0, 66, 70)), False, 3e-3),
        (Toy(B=1, T=70, J=1, K=64, V=16, decay=0.01, dtype=F16), True, 3e-3),
        (Toy(B=1, T=140, K=60, V=20, bounds=(0, 0, 9, 138), unit=False, dtype=F16), True, 3e-3),
        (Toy(B=1, T=70, H=2, J=4, K=100, V=132, unit=False, dtype=F16), True, 3e-3),
        (Toy(B=1, T=140, J=1, K=64, V=16, beta=1.0, decay=0.01, unit=False, dtype=F16), True, 3e-3),
    ],
)
def test_values_and_gradients(interpreter, toy: Toy, hopper: bool, most: float):
    errors = interpreter(kernel_errors, toy, hopper)
    assert max(errors) < most, errors


def errors_of_other_sums(toy: Toy) -> list[float]:
    """Compare with sums along rows as a GPU adds them: of the two numbers before, then of four, and so on."""

    def cumsum(x: np.ndarray, axis: int) -> np.ndarray:
        x = np.moveaxis(x, axis, -1).copy()
        for step in (2**level for level in range(x.shape[-1].bit_length())):
            x[..., step:] = x[..., step:] + x[..., :-step]
        return np.moveaxis(x, -1, axis)

    with patch.object(np, "cumsum", cumsum):
        return kernel_errors(toy, False)


def test_the_last_write_of_a_short_chunk_does_not_decay(interpreter):
    errors = interpreter(errors_of_other_sums, Toy(B=1, T=63, J=1, K=64, V=16, decay=50.0, dtype=F32))
    dg = errors.pop(5)  # as large as the rounding of a decay, a difference of numbers of a thousand
    assert max(errors) < 2e-6, errors
    assert dg < 1e-4, dg


def partial_errors(index: int, compiled: bool) -> list[float]:
    """Compare gradients of the outputs alone, or of the final states alone."""
    toy = Toy(T=20, J=1, K=16, V=16, dtype=F32)
    inputs = [x.requires_grad_() for x in toy.inputs()]

    def loss(*x: Tensor, backend: str = "reference") -> Tensor:
        return chunk_gated_delta_rule(*x[:5], None, x[5], True, backend=backend)[index].sin().sum()

    kernels = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    found = torch.autograd.grad(kernels(*inputs, backend="triton"), inputs, materialize_grads=True)
    return relative_errors(
        found, [x.double() for x in torch.autograd.grad(loss(*inputs), inputs, materialize_grads=True)]
    )


@pytest.mark.parametrize(("index", "compiled"), [(0, False), (1, False), (0, True), (1, True)])
def test_gradients_of_one_result(interpreter, index: int, compiled: bool):
    errors = interpreter(partial_errors, index, compiled)
    assert max(errors) < 2e-6, errors


def operators_of_a_backward(states: bool) -> set[str]:
    inputs = [x.requires_grad_() for x in Toy(T=20, J=1, K=16, V=16, dtype=F32).inputs()]
    o, _ = chunk_gated_delta_rule(*inputs[:5], None, inputs[5], states, backend="triton")
    with torch.profiler.profile() as profile:
        torch.autograd.grad(o, inputs, torch.ones_like(o))
    return {event.name for event in profile.events()}


@pytest.mark.parametrize("states", [False, True])
def test_what_the_gradient_needs_again_gets_no_gradient(interpreter, states: bool):
    """PyTorch would fill one with zeros for each of those tensors."""
    operators = interpreter(operators_of_a_backward, states)
    assert "crosstalk::gated_delta_backward" in operators
    assert "aten::zeros" not in operators


@pytest.mark.parametrize(
    ("V", "rows", "directions", "programs", "columns", "warps"),
    [
        (128, 4, 1, 256, 16, 4),
        (128, 4, 2, 256, 32, 4),
        (128, 8, 2, 128, 128, 8),
        (128, 16, 1, 128, 128, 8),
        (128, 160, 1, 1280, 128, 8),
        (36, 4, 1, 96, 16, 4),
        (8, 4, 1, 32, 16, 4),
        (36, 40, 1, 320, 128, 8),
    ],
)
def test_sweeps_are_narrow_where_a_gpu_would_be_idle(
    V: int, rows: int, directions: int, programs: int, columns: int, warps: int
):
    k, v = torch.empty(rows, 1, 8, 64), torch.empty(rows, 1, 8, V)
    problem = Problem(*sizes_of(k, v, None, True, True))
    problem.multiprocessors = 132
    found = problem.fill(Launch(128, 8, 2), directions)
    assert found == (programs, Launch(columns, warps, 2))


@pytest.mark.parametrize(
    ("width", "parts"), [(16, (0, 0)), (64, (2, 1)), (100, (2, 1)), (256, (2, 1))], ids=lambda x: str(x)
)
@pytest.mark.parametrize("major", [8, 9, 10])
def test_betas_of_at_most_one_take_products_of_one_part(major: int, width: int, parts: tuple[int, int]):
    both, to_one = (configuration(major, True, width, negative) for negative in (True, False))
    assert (both.parts, to_one.parts) == parts


@pytest.mark.parametrize("change", [{"dtype": F16}, {"device": "meta"}])
def test_inputs_of_other_kinds_have_launches_of_their_own(interpreter, change: dict):
    assert interpreter(plans, change) == [1, 2, 3]


def plans(change: dict) -> list[int]:
    """Count the plans after calls with equal inputs, with packed ones, and with log-decays of another kind."""
    from kernels.gated_delta import launch

    launch.plan_forward.cache_clear()
    *rows, _ = Toy(B=1, K=16, V=16, dtype=F32).inputs()
    inputs = *rows, None, None, 1.0, True, True, False
    counts = []
    for changed in ({}, {6: torch.tensor([0, 30, 40])}, {3: rows[3].to(**change)}):
        for _ in range(2):
            with suppress(NotImplementedError):  # of tensors without data
                launch.run_forward(*(changed.get(index, value) for index, value in enumerate(inputs)))
        counts.append(launch.plan_forward.cache_info().currsize)
    return counts


def member_errors(bounds: tuple[int, ...] | None, compiled: bool) -> list[float]:
    toy = Toy(B=1, T=20, K=16, V=16, bounds=bounds, dtype=F32)
    stacked = [torch.stack(x) for x in zip(*(toy.inputs(seed) for seed in range(2)), strict=True)]
    state = stacked.pop()[0]  # which both members share

    def members(backend: str) -> Callable:
        def call(*rows: Tensor) -> tuple[Tensor, Tensor | None]:
            return chunk_gated_delta_rule(*rows, cu_seqlens=toy.cu_seqlens, backend=backend)

        def together(*x: Tensor | float | bool) -> tuple[Tensor, Tensor | None]:
            return vmap(call, (0, 0, 0, 0, 0, None, None, None))(*x)

        return together

    kernels = members("triton")
    if compiled:
        kernels = torch.compile(kernels, backend="aot_eager", fullgraph=True)
    inputs = [*stacked, state]
    return relative_errors(results(kernels, inputs), [x.double() for x in results(members("reference"), inputs)])


@pytest.mark.parametrize(("bounds", "compiled"), [(None, False), ((0, 7, 7, 18), False), (None, True)])
def test_members_of_an_ensemble(interpreter, bounds: tuple[int, ...] | None, compiled: bool):
    errors = interpreter(member_errors, bounds, compiled)
    assert max(errors) < 2e-6, errors


def recorded() -> list[tuple[str, object]]:
    """Record the launches of a small step as the benchmark of launches does; return names and the table's launches."""
    from benchmarks import gated_delta_configurations as benchmark

    inputs = [x.requires_grad_() for x in Toy(B=1, T=40, J=1, K=16, V=16, dtype=F32).inputs()[:5]]
    rule = partial(chunk_gated_delta_rule, backend="triton")
    given = {"inputs": lambda *sizes: inputs, "ours": lambda *values: rule(*values)[0]}
    with patch.multiple(benchmark, **given):
        calls = benchmark.record("1,40,1,16,16", None)
    for call in calls:
        call.with_launch(call.table, 0)()
    return [(call.name, call.table) for call in calls]


def test_the_benchmark_of_launches_records_each_kernel(interpreter: Callable) -> None:
    how = configuration(0, False, 16, True)
    assert interpreter(recorded) == [
        ("prepare_chunks", how.prepare),
        ("compute_outputs", how.outputs),
        ("sweep_both_ways", how.sweeps),
        ("compute_gradients", how.gradients),
    ]
