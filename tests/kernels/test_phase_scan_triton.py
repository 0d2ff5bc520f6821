"""The Triton kernels in Triton's interpreter, beside the reference in fp64.

The interpreter has to be on before Triton is imported, so all of this runs in one other process. It shows that the
arithmetic is right, not what a compiler makes of it: `benchmarks/phase_scan_check.py` does that on a GPU.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from toy_phase_scan import Toy

from kernels.phase_scan import phase_scan

F32, F16 = torch.float32, torch.float16


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable]:
    """Return a function that calls another one in a process with the interpreter."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        yield lambda call, *arguments: pool.submit(call, *arguments).result()


def small_tiles(forward: int = 2, backward: int = 2) -> None:
    """Let tiles have these numbers of groups, and few rows and channels: the interpreter treats each number on its own.

    Args:
        forward: Groups of a tile of the forward; each group has two rows.
        backward: Groups of a tile of the backward.
    """
    from kernels.phase_scan import configurations

    how = configurations.Configuration(
        *(configurations.Launch(rows=2, groups=n, channels=4, warps=1, stages=1) for n in (forward, backward))
    )
    configurations.TABLE.update(dict.fromkeys(configurations.TABLE, how))


def relative_errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Return an error per tensor; that of a NaN is infinite, which `max` does not overlook."""
    pairs = zip(found, expected, strict=True)
    errors = [(x.double() - y).norm() / y.norm().clamp(min=1e-100) for x, y in pairs]
    return [float(error.nan_to_num(torch.inf)) for error in errors]


def results(call: Callable, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return outputs, final states and all gradients of a function of both."""
    inputs = {name: v.detach().clone().requires_grad_() for name, v in inputs.items()}
    y, final = call(**inputs)
    loss = (0.1 * y.double()).sin().sum() + (0.1 * final.double()).sin().sum()
    return [y.detach(), final.detach(), *torch.autograd.grad(loss, list(inputs.values()))]


def errors_of(inputs: dict[str, Tensor], groups: tuple[int, int] = (2, 2), **options: object) -> list[float]:
    """Return the errors of all results of the kernels, with small tiles, beside those of the reference in fp64."""
    small_tiles(*groups)

    def call(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        wide = inputs["x"].dtype == torch.float64
        return phase_scan(**inputs, **options, output_final_state=True, backend="reference" if wide else "triton")

    return relative_errors(results(call, inputs), results(call, {name: v.double() for name, v in inputs.items()}))


def kernel_errors(toy: Toy, groups: tuple[int, int] = (2, 2)) -> list[float]:
    return errors_of(toy.inputs(), groups, **toy.options)


@pytest.mark.parametrize(
    ("toy", "most"),
    [
        (Toy(T=9, decay=None, extras=False, dtype=F32, rate=20.0), 2e-6),
        (Toy(B=1, T=10, bounds=(0, 0, 5, 9), dtype=F32), 2e-6),
        (Toy(B=1, T=6, decay="channel", strength=0.01, dtype=F32), 2e-6),
        (Toy(B=1, T=9, strength=50.0, extras=False, dtype=F32), 2e-6),
        (Toy(B=1, T=9, decay="channel", strength=torch.inf, extras=False, dtype=F32), 2e-6),  # gates of 0
        (Toy(B=1, T=8, decay="channel", strength=0.5, dtype=F32, rate=2e4), 2e-6),  # all tiles are whole
        (Toy(T=8, extras=False, dtype=F32), 2e-6),
        (Toy(B=1, T=6, D=1, bounds=(0, 5), decay="channel", extras=False, dtype=F16), 3e-3),
    ],
    ids=str,
)
def test_values_and_gradients(interpreter, toy: Toy, most: float):
    errors = interpreter(kernel_errors, toy)
    assert max(errors) < most, errors


@pytest.mark.parametrize("groups", [(4, 2), (2, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("toy", [Toy(T=17, D=5, dtype=F32), Toy(B=1, T=18, bounds=(0, 0, 8, 17), dtype=F32)], ids=str)
def test_tiles_of_two_lengths(interpreter, toy: Toy, groups: tuple[int, int]):
    """The forward keeps states inside its tiles, or after several of them."""
    errors = interpreter(kernel_errors, toy, groups)
    assert max(errors) < 2e-6, errors


SUMS = Toy(B=1, T=13, D=3, decay=None, normalised=False, dtype=F32)


@pytest.mark.parametrize(
    ("toy", "most"),
    [
        *((replace(SUMS, window=window), 2e-6) for window in (2, 3, 4, 7, 20)),
        (replace(SUMS, window=9, extras=False, rate=20.0), 2e-6),
        (replace(SUMS, window=2, bounds=(0, 0, 5, 12)), 2e-6),
        (replace(SUMS, window=6, bounds=(0, 0, 5, 12)), 2e-6),
        (replace(SUMS, window=6, extras=False, dtype=torch.bfloat16), 1e-2),
    ],
    ids=str,
)
def test_window_without_decay(interpreter, toy: Toy, most: float):
    """Chunks of a window are shorter than the tiles of four rows, as long, longer, and longer than the sequence."""
    errors = interpreter(kernel_errors, toy)
    assert max(errors) < most, errors


def window_of_equal_rows(window: int) -> tuple[list[float], float, float]:
    """Return errors where all rows are alike, and what a large value leaves in outputs and gradients after a window."""
    rows = Toy(B=1, T=50, D=1, decay=None, extras=False, dtype=F32).inputs()
    rows["omega"].fill_(3.1)
    rows["x"].fill_(0.7)

    errors = errors_of(rows, window=window)
    rows["x"][:, 5] = 1e6
    large, zero = (
        phase_scan(**values, window=window, backend="triton")[0]
        for values in (rows, rows | {"x": rows["x"].clone().index_fill(1, torch.tensor(5), 0.0)})
    )
    x = rows["x"].clone().requires_grad_()
    y, _ = phase_scan(x, rows["omega"], window=window, backend="triton")
    late = torch.autograd.grad(y[:, 40].sum(), x)[0][:, : 40 - window + 1]
    return errors, float((large - zero)[:, 5 + window :].abs().max()), float(late.abs().max())


@pytest.mark.parametrize("window", [3, 10])
def test_window_loses_no_digits_and_forgets(interpreter, window: int):
    errors, left, late = interpreter(window_of_equal_rows, window)
    assert max(errors) < 2e-6, errors
    assert left == 0
    assert late == 0


def drift() -> list[float]:
    """Return the error where the phase and the log-decay are constant, so that all rounding errors have one sign."""
    small_tiles()
    inputs = Toy(B=1, T=120, D=1, decay="channel", extras=False, dtype=F32).inputs()
    inputs["omega"].fill_(3.1)
    inputs["log_decay"].fill_(-0.003)
    y, _ = phase_scan(**inputs, backend="triton")
    expected, _ = phase_scan(**{name: v.double() for name, v in inputs.items()}, backend="reference")
    return relative_errors([y], [expected])


def test_constant_phases_do_not_drift(interpreter):
    assert interpreter(drift)[0] < 5e-7


def nan_phase_errors() -> list[float]:
    """Return errors where the bits of the phase before the second tile are those of a NaN in fp32."""
    inputs = Toy(B=1, T=8, D=1, decay=None, extras=False, dtype=F32).inputs()
    inputs["omega"][:, :4] = 0
    inputs["omega"][:, 1] = 0x7F812345 / 2**32 * 2 * torch.pi
    return errors_of(inputs)


def test_phases_keep_their_bits(interpreter):
    """The kernels keep phases, which are integers, among states in fp32."""
    errors = interpreter(nan_phase_errors)
    assert max(errors) < 2e-6, errors


def causality_holds() -> bool:
    """Return whether later inputs leave outputs, and gradients of later positions, exactly as they are."""
    small_tiles()
    inputs = Toy(B=1, T=6, D=1, dtype=F32).inputs()
    rows = {name: v for name, v in inputs.items() if name != "initial_state"}
    for t in (1, 2):
        values = {name: v.detach().clone().requires_grad_() for name, v in rows.items()}
        y, _ = phase_scan(**values, normalise=True, backend="triton")
        gradients = torch.autograd.grad(y[:, t].sum(), list(values.values()))
        other = {name: torch.cat((v[:, : t + 1], 2 * v[:, t + 1 :]), 1) for name, v in rows.items()}
        changed, _ = phase_scan(**other, normalise=True, backend="triton")
        if not (changed[:, : t + 1].equal(y[:, : t + 1]) and all(g[:, t + 1 :].eq(0).all() for g in gradients)):
            return False
    return True


def test_causality_is_exact(interpreter):
    assert interpreter(causality_holds)


def nan_stays_behind(decay: Literal["channel", "input"] | None) -> bool:
    """Return whether a NaN leaves outputs before it, and one of their gradient the gradients after it, as they are."""
    small_tiles()
    inputs = Toy(B=1, T=6, D=1, decay=decay, extras=False, dtype=F32).inputs()
    bad = inputs | {"x": inputs["x"].clone().index_fill(1, torch.tensor(3), torch.nan)}  # the second row of its group
    clean, found = (phase_scan(**values, backend="triton")[0] for values in (inputs, bad))
    x = inputs["x"].clone().requires_grad_()
    y, _ = phase_scan(**inputs | {"x": x}, backend="triton")
    ones = torch.ones_like(y)
    late, bad_late = (
        torch.autograd.grad(y, x, dy, retain_graph=True)[0][:, 3:]
        for dy in (ones, ones.index_fill(1, torch.tensor(2), torch.nan))
    )
    return found[:, :3].equal(clean[:, :3]) and bad_late.equal(late)


@pytest.mark.parametrize("decay", [None, "channel", "input"])
def test_nan_does_not_reach_rows_before_it(interpreter, decay: Literal["channel", "input"] | None):
    assert interpreter(nan_stays_behind, decay)


def member_errors(toy: Toy, compiled: bool) -> list[float]:
    small_tiles()
    members = [toy.inputs(seed) for seed in range(2)]
    shared = members[0].pop("initial_state")
    stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}

    def members_of(backend: str) -> Callable:
        def call(rows: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
            options = toy.options | {"output_final_state": True, "backend": backend}
            return phase_scan(**rows, **options, initial_state=state)

        def together(initial_state: Tensor, **rows: Tensor) -> tuple[Tensor, Tensor]:
            return vmap(call, (0, None))(rows, initial_state)

        return together

    kernels = members_of("triton")
    if compiled:
        kernels = torch.compile(kernels, backend="aot_eager", fullgraph=True)
    inputs = stacked | {"initial_state": shared}
    wide = {name: v.double() for name, v in inputs.items()}
    return relative_errors(results(kernels, inputs), results(members_of("reference"), wide))


@pytest.mark.parametrize(
    ("toy", "compiled"),
    [
        (Toy(T=5, D=1, dtype=F32), False),
        (Toy(T=5, D=1, decay="channel", dtype=F32), False),
        (Toy(B=1, T=6, D=1, bounds=(0, 2, 2, 5), dtype=F32), False),
        (Toy(T=5, D=1, decay="channel", dtype=F32), True),
        (Toy(T=7, D=1, decay=None, window=3, normalised=False, dtype=F32), True),
        (Toy(B=1, T=9, D=1, decay=None, window=5, normalised=False, bounds=(0, 2, 2, 8), dtype=F32), False),
    ],
    ids=str,
)
def test_members_of_an_ensemble(interpreter, toy: Toy, compiled: bool):
    errors = interpreter(member_errors, toy, compiled)
    assert max(errors) < 2e-6, errors


def rows_without_a_number(name: str, value: float, window: int | None) -> list[list[bool]]:
    """Return where outputs are NaN if one number of an input, in row 5 of 8, is one that phases cannot have."""
    small_tiles()
    rows = Toy(B=1, T=8, D=1, decay=None, dtype=F32, window=window, normalised=False).inputs()
    del rows["initial_state"]
    rows[name][:, 5] = value
    outputs = [phase_scan(**rows, window=window, backend=backend)[0] for backend in ("triton", "reference")]
    return [y.isnan().flatten().tolist() for y in outputs]


@pytest.mark.parametrize("name", ["omega", "read_offset", "write_offset"])
@pytest.mark.parametrize("window", [None, 3])
def test_lost_phases_become_nan(interpreter, name: str, window: int | None):
    """The kernels count phases in integers, which have no NaN: outputs must not look like those of another phase."""
    for value in (float("nan"), float("inf"), -float("inf")):
        found, expected = interpreter(rows_without_a_number, name, value, window)
        last = 8 if window is None else 5 + window  # a window forgets the row
        assert found[:last] == expected[:last]
    found, _ = interpreter(rows_without_a_number, name, -1e5, window)
    assert found[:5] == [False] * 5
    assert found[5]
    found, _ = interpreter(rows_without_a_number, name, 2e4, window)
    assert not any(found)
