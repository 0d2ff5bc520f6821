"""The reference of the phase scan: the definition, its other forms, gradients, accuracy, causality."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy_phase_scan import Toy

from kernels.phase_scan import accumulate_phase, phase_scan, reference, step_phase_scan, zero_state
from kernels.phase_scan.direct import direct_phase_scan

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def rows_of(inputs: dict[str, Tensor], part: slice | int) -> dict[str, Tensor]:
    """Return the inputs at some positions, without the initial state."""
    rows = {name: v for name, v in inputs.items() if name != "initial_state"}
    return {name: v if v.dim() == 1 else v[:, part] for name, v in rows.items()}


def whole(inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    return phase_scan(**inputs, **options, output_final_state=True)


def by_steps(inputs: dict[str, Tensor], window, normalise, imaginary) -> tuple[Tensor, Tensor]:
    x, outputs = inputs["x"], []
    state = inputs.get("initial_state", zero_state(x.shape[0], x.shape[2], window, normalise, x.dtype))
    for t in range(x.shape[1]):
        y, state = step_phase_scan(state=state, **rows_of(inputs, t), normalise=normalise, imaginary=imaginary)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def in_parts(inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    outputs, state = [], inputs.get("initial_state")
    for part in (slice(0, 13), slice(13, 13), slice(13, None)):
        y, state = phase_scan(**rows_of(inputs, part), **options, initial_state=state, output_final_state=True)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def after_positions(inputs: dict[str, Tensor], window, normalise, imaginary) -> tuple[Tensor, None]:
    """Compute the definition; an initial state is what positions without phase or decay wrote before the first."""
    rows = rows_of(inputs, slice(None))
    x = rows["x"]
    if "initial_state" in inputs:
        state = inputs["initial_state"] if window else inputs["initial_state"][:, None]
        sizes, before = torch.complex(state[:, :, 0], state[:, :, 1]), torch.zeros_like(state[:, :, 0])
        masses = state[:, :, 2] if normalise else torch.ones_like(before)
        values = {"x": sizes.abs() / masses, "write_offset": sizes.angle(), "mass": masses}
        if "log_decay" in rows:
            rows["log_decay"] = rows["log_decay"].expand_as(x)
        rows = {name: torch.cat((values.get(name, before), v), 1) for name, v in rows.items()}
    y = direct_phase_scan(**rows, window=window, normalise=normalise, imaginary=imaginary)
    return y[:, y.shape[1] - x.shape[1] :], None


@pytest.mark.parametrize(
    "toy",
    [
        Toy(T=1),
        Toy(T=32, decay=None, extras=False),
        Toy(T=65),
        Toy(T=65, decay="channel"),
        Toy(decay=None),
        Toy(strength=60.0),
        Toy(decay="channel", strength=1e4, extras=False),
        Toy(window=1),
        Toy(window=7),
        Toy(window=33, decay="channel"),
        Toy(window=100, decay=None),
        Toy(window=8, strength=60.0, extras=False),
        Toy(window=40, extras=False),
    ],
    ids=str,
)
def test_all_forms_agree(toy: Toy):
    inputs = {name: v.requires_grad_() for name, v in toy.inputs().items()}
    expected_y, _ = after_positions(inputs, **toy.options)
    expected = torch.autograd.grad(expected_y.sin().sum(), list(inputs.values()))
    _, last = by_steps(inputs, **toy.options)
    for form in (whole, by_steps, in_parts):
        y, state = form(inputs, **toy.options)
        torch.testing.assert_close(y, expected_y, **TOLERANCE)
        torch.testing.assert_close(state, last, **TOLERANCE)
        found = torch.autograd.grad(y.sin().sum(), list(inputs.values()))
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("window", [None, 5])
def test_definition(window: int | None):
    """One channel, written beside the formula."""
    toy = Toy(B=1, D=1, window=window)
    inputs = rows_of(toy.inputs(), slice(None))
    x, omega, log_decay, m, read, write = (v[0, :, 0].tolist() for v in inputs.values())
    y, _ = phase_scan(**inputs, **toy.options)
    for t in range(toy.T):
        total, masses = 0.0, 1e-6
        for s in range(0 if window is None else max(0, t - window + 1), t + 1):
            decayed = m[s] * math.exp(sum(log_decay[s + 1 : t + 1]))
            angle = sum(omega[: s + 1]) + write[s] - sum(omega[: t + 1]) - read[t]
            total += decayed * x[s] * complex(math.cos(angle), math.sin(angle))
            masses += decayed
        torch.testing.assert_close(torch.complex(*y[0, t]).item(), total / masses, **TOLERANCE)


def test_decoupled_phases():
    """Keys and queries with their own rates, as the sum over pairs; in two parts, too."""
    toy = Toy(decay=None, extras=False)
    x, key = toy.inputs().values()
    query = toy.inputs(1)["omega"]
    angle = query.cumsum(1)[:, :, None] - key.cumsum(1)[:, None]
    inside = torch.ones(toy.T, toy.T, dtype=torch.bool).tril()[:, :, None]
    expected = (angle.cos() * inside * x[:, None]).sum(2)
    offset = accumulate_phase(query - key)
    torch.testing.assert_close(phase_scan(x, key, read_offset=offset)[0], expected, **TOLERANCE)
    rest = accumulate_phase((query - key)[:, 13:], offset[:, 12])
    _, state = phase_scan(x[:, :13], key[:, :13], output_final_state=True)
    y, _ = phase_scan(x[:, 13:], key[:, 13:], read_offset=rest, initial_state=state)
    torch.testing.assert_close(y, expected[:, 13:], **TOLERANCE)


def test_cumulative_phases():
    omega = Toy(B=1, T=50, rate=100.0).inputs()["omega"].requires_grad_()
    bounds = torch.tensor([0, 20, 20, 45])
    phase = accumulate_phase(omega, torch.ones(3, 3), bounds)
    assert phase.abs().max() <= torch.pi
    sums = torch.cat((1 + omega[:, :20].cumsum(1), 1 + omega[:, 20:45].cumsum(1), 0 * omega[:, 45:]), 1)
    torch.testing.assert_close((phase - sums).sin(), torch.zeros_like(omega), **TOLERANCE)
    torch.testing.assert_close((phase - sums).cos(), torch.ones_like(omega), **TOLERANCE)
    found, expected = (torch.autograd.grad((v * omega.detach()).sum(), omega)[0] for v in (phase, sums))
    torch.testing.assert_close(found, expected, **TOLERANCE)
    fast = torch.full((1, 16384, 1), 3.0)
    exact = torch.remainder(3.0 * torch.arange(1, 16385).double() + torch.pi, 2 * torch.pi) - torch.pi
    assert (accumulate_phase(fast)[0, :, 0] - exact).abs().max() < 3e-7


@pytest.mark.parametrize("bounds", [None, (0, 2, 2, 6)])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("decay", ["channel", "input"])
def test_gradients(bounds, window, decay):
    toy = Toy(B=1, T=6, D=1, bounds=bounds, window=window, decay=decay)
    inputs = toy.inputs()

    def both(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(inputs, values, strict=True))
        return reference.phase_scan(**named, **toy.options, output_final_state=True, chunk=4)

    assert torch.autograd.gradcheck(both, [v.requires_grad_() for v in inputs.values()])


@pytest.mark.parametrize("window", [None, 16])
def test_gate_gradient_under_strong_decay(window: int | None):
    """Differences of sums of log-decays or phases would leave rounding errors far above a gradient of 1e-22."""
    toy = Toy(B=1, strength=50.0, window=window, extras=False)
    inputs = {name: v.requires_grad_() for name, v in toy.inputs().items()}
    gates = inputs["log_decay"], inputs["omega"]
    found = torch.autograd.grad(whole(inputs, **toy.options)[0].sin().sum(), gates)
    expected = torch.autograd.grad(by_steps(inputs, **toy.options)[0].sin().sum(), gates)
    for x, y in zip(found, expected, strict=True):
        assert 0 < y.abs().max() < 1e-9
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-32)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("decay", "strength", "window"),
    [
        (None, 0.0, None),
        ("channel", 1e-3, None),
        ("input", 0.1, None),
        ("input", 8.0, None),
        ("channel", 1e-3, 64),
        (None, 0.0, 8),
    ],
)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
def test_accuracy_at_16384_positions(decay, strength: float, window: int | None, dtype: torch.dtype, most: float):
    toy = Toy(B=1, T=16384, D=2, decay=decay, strength=strength, window=window, extras=False, dtype=dtype)
    inputs = toy.inputs()
    inputs["omega"][..., 0] = 3.0  # a constant phase, whose rounding errors all have the same sign
    results, cotangent = [], torch.randn(inputs["x"].shape).to(dtype)
    for wide in (False, True):
        values = {name: (v.double() if wide else v).requires_grad_() for name, v in inputs.items()}
        y, _ = whole(values, **toy.options)
        results.append([y, *torch.autograd.grad(y, list(values.values()), cotangent.to(y.dtype))])
    errors = [relative_error(x.detach(), y.detach()) for x, y in zip(*results, strict=True)]
    assert all(error <= most for error in errors), errors  # `max` would overlook a NaN
    if window is None and dtype == torch.float32:
        assert relative_error(y[0, -1].detach(), last_output(values).detach()) <= most


def last_output(inputs: dict[str, Tensor]) -> Tensor:
    """Return the sum of the definition at the last position, in fp64."""
    x, omega = (inputs[name][0].double() for name in ("x", "omega"))
    log_decay = inputs.get("log_decay", torch.zeros(())).double().expand_as(x[None])[0]
    later = [v.flip(0).cumsum(0).flip(0) - v for v in (omega, log_decay)]
    return (later[1].exp() * later[0].cos() * x).sum(0)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("decay", ["channel", "input"])
def test_packed_sequences(window: int | None, decay):
    toy = Toy(B=1, T=80, bounds=(0, 0, 5, 70, 70, 71, 71), window=window, decay=decay)
    inputs = toy.inputs()
    y, final = whole(inputs, **toy.options)
    assert y[:, 71:].eq(0).all()
    alone = replace(toy, bounds=None).options
    for n, (first, last) in enumerate(zip(toy.bounds, toy.bounds[1:], strict=False)):
        state = inputs["initial_state"][n : n + 1]
        part, after = whole(rows_of(inputs, slice(first, last)) | {"initial_state": state}, **alone)
        torch.testing.assert_close(y[:, first:last], part, **TOLERANCE)
        torch.testing.assert_close(final[n], after[0], **TOLERANCE)


@pytest.mark.parametrize(("window", "decay"), [(None, "input"), (5, "input"), (5, None)])
def test_causality_is_exact(window: int | None, decay):
    toy = Toy(T=70, window=window, decay=decay)
    inputs = {name: v.requires_grad_() for name, v in toy.inputs().items()}
    y, _ = whole(inputs, **toy.options)
    rows = {name: v for name, v in inputs.items() if name != "initial_state"}
    for t in (0, 31, 32, 68):
        gradients = torch.autograd.grad(y[:, t].sum(), list(rows.values()), retain_graph=True)
        for name, gradient in zip(rows, gradients, strict=True):
            assert gradient[:, t + 1 :].eq(0).all(), name
            assert gradient[:, t].ne(0).any(), name
            most = 1e-12 if decay is None and name == "omega" else 0  # phases from before the window cancel to rounding
            assert window is None or (gradient[:, : max(t - window + 1, 0)].abs() <= most).all(), name
        other = {name: torch.cat((v[:, : t + 1], 2 * v[:, t + 1 :]), 1) for name, v in rows.items()}
        changed, _ = whole(inputs | other, **toy.options)
        assert changed[:, : t + 1].equal(y[:, : t + 1])
