"""The phase scan with PyTorch's associative scan, for benchmarks/phase_scan.py; compiled forward and backward.

PyTorch's own gradient of `associative_scan` needs a matrix of T x T numbers for each channel, and treats the real and
imaginary parts of a recurrence as independent. So the backward here is the scan in the other direction:

    h_t = a_t h_{t-1} + m_t x_t,    mu_t = dy_t + conj(a_{t+1}) mu_{t+1},    a_t = exp(l_t - i omega_t)
    d(m_t x_t) = Re mu_t,    domega_t = Im(conj(mu_t) a_t h_{t-1}),    dl_t = Re(conj(mu_t) a_t h_{t-1})
"""

import importlib
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

Parts = tuple[Tensor, ...]


def associative_scan(x: Tensor, omega: Tensor, mass: Tensor | None = None, log_decay: Tensor | None = None) -> Tensor:
    """Compute the recurrence."""
    result: Tensor = _Scan.apply(x, omega, mass, log_decay)  # type: ignore[no-untyped-call]
    return result


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        y, re, im = cast(Parts, _compiled_outputs(*inputs))
        ctx.save_for_backward(*inputs, re, im)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor | None, ...] = _compiled_gradients(dy, *ctx.saved_tensors)
        return found


def _outputs(x: Tensor, omega: Tensor, mass: Tensor | None, log_decay: Tensor | None) -> Parts:
    """Return y, and the real and imaginary parts of the memory in fp32."""
    written = x.float() if mass is None else x.float() * mass.float()
    gate_re, gate_im = _gates(omega, log_decay)
    re, im = _scan(gate_re, gate_im, written, torch.zeros_like(written), False)
    return re.to(x.dtype), re, im


def _gradients(
    dy: Tensor, x: Tensor, omega: Tensor, mass: Tensor | None, log_decay: Tensor | None, re: Tensor, im: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the four inputs."""
    gate_re, gate_im = (pad(part[:, 1:], (0, 0, 0, 1)) for part in _gates(omega, log_decay))
    g = dy.float()
    mu_re, mu_im = _scan(gate_re, -gate_im, g, torch.zeros_like(g), True)
    kept_re, kept_im = re - x.float() * (1.0 if mass is None else mass.float()), im
    domega = mu_re * kept_im - mu_im * kept_re
    dlog_decay = None
    if log_decay is not None:
        dlog_decay = mu_re * kept_re + mu_im * kept_im
        dlog_decay = (dlog_decay.sum((0, 1)) if log_decay.dim() == 1 else dlog_decay).to(log_decay.dtype)
    dx = (mu_re if mass is None else mu_re * mass.float()).to(x.dtype)
    dmass = None if mass is None else (mu_re * x.float()).to(mass.dtype)
    return dx, domega.to(omega.dtype), dmass, dlog_decay


def _gates(omega: Tensor, log_decay: Tensor | None) -> Parts:
    """Return the real and imaginary parts of the gates in fp32."""
    decay = 1.0 if log_decay is None else log_decay.float().exp()
    return omega.float().cos() * decay, -omega.float().sin() * decay


def _scan(gate_re: Tensor, gate_im: Tensor, re: Tensor, im: Tensor, reverse: bool) -> Parts:
    """Return S_t = gate_t S_{t-1} + u_t, or with S_{t+1} if it is reversed."""
    scan: Any = importlib.import_module("torch._higher_order_ops.associative_scan").associative_scan

    def combine(first: Parts, second: Parts) -> Parts:
        a, b, u, v = first
        c, d, w, z = second
        return a * c - b * d, a * d + b * c, c * u - d * v + w, c * v + d * u + z

    mode = "pointwise" if re.is_cuda else "generic"
    parts = tuple(part.contiguous() for part in (gate_re, gate_im, re, im))
    found: Parts = scan(combine, parts, dim=1, reverse=reverse, combine_mode=mode)
    return found[2:]


_compiled_outputs: Any = torch.compile(_outputs, dynamic=False)
_compiled_gradients: Any = torch.compile(_gradients, dynamic=False)
