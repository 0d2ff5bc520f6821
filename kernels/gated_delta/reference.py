"""The gated delta rule in plain PyTorch: the definition, one position after the other, and an equal form in chunks.

Each head has a state S [K, V]. At position t, with log-decay g_t <= 0 and writing strength beta_t in [0, 2]:

    S <- exp(g_t) S                      the state decays
    e_t = v_t - S^T k_t                  the error of what the key reads
    S <- S + beta_t k_t e_t^T            the error is written
    o_t = scale S^T q_t                  the query reads

In a chunk, let c be the cumulative sum of g, G_ij = exp(c_i - c_j) for i >= j, and S the state before the chunk. Then
the errors E solve a triangular system, and everything else is a matrix product. No exponent is above 0:

    (I + strict(K K^T o G) diag(beta)) E = V - exp(c) K S
    O = scale (exp(c) Q S + tril(Q K^T o G) diag(beta) E)
    S <- exp(c_last) S + (exp(c_last - c) K)^T diag(beta) E

Source: Yang, Kautz and Hatamizadeh, Gated Delta Networks (2024), arXiv:2412.06464.

Shapes: B batch, T positions, H heads of queries and keys, J heads of values (a multiple of H), K and V their widths,
N sequences, C positions of a chunk, M chunks. Inside, tensors are [N, J, T, ...].
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.gated_delta.checks import check_step
from kernels.gated_delta.options import Rule, default_scale
from kernels.gated_delta.packing import Packing

EPSILON = 1e-6  # of the l2 norm, inside the root
CHUNK = 32  # positions; the fastest of 16, 32, 64 and 128 on a CPU
FLOORS = {
    torch.float32: -120.0,
    torch.float64: -800.0,
}  # exp(floor) is 0: sums of lower log-decays lose digits or are NaN
SEED_FLOOR = -60.0  # lower log-decays overflow in beta / exp(g); exp(floor) is below the precision of fp64

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(rule: Callable[P, R]) -> Callable[P, R]:
    """Return a function that computes outside of autocast, whose bf16 products would round the state."""

    @wraps(rule)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        device = next(x.device.type for x in (*arguments, *options.values()) if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return rule(*arguments, **options)

    return run


@without_autocast
def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    rule: Rule = "standard",
) -> tuple[Tensor, Tensor | None]:
    """Compute the definition, one position after the other; see `kernels.gated_delta` for the arguments."""
    packing, length, output_type = Packing(cu_seqlens), v.shape[1], v.dtype
    scale = default_scale(scale, k.shape[-1], rule)
    inputs = standard_inputs(q, k, v, g, beta, use_qk_l2norm_in_kernel, rule)
    q, k, v, g, beta = (packing.unpack(x).transpose(1, 2) for x in inputs)
    state = start_state(k, v, initial_state)
    outputs = [v[:, :, :0]]
    for t in range(v.shape[2]):
        o, state = _step(q[:, :, t], k[:, :, t], v[:, :, t], g[:, :, t], beta[:, :, t], state)
        outputs.append(o[:, :, None] * scale)
    o = packing.pack(torch.cat(outputs, 2).transpose(1, 2), length)
    return o.to(output_type), state if output_final_state else None


@without_autocast
def step_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    rule: Rule = "standard",
) -> tuple[Tensor, Tensor]:
    """Compute one position, for generation.

    Args:
        q: Queries [B, H, K].
        k: Keys [B, H, K].
        v: Values [B, J, V].
        g: Log-decays [B, J].
        beta: Writing strengths [B, J].
        state: The state before the position [B, J, K, V] in fp32 (fp64 beside fp64 values).
        scale: Factor of the output; 1 / sqrt(K) by default.
        use_qk_l2norm_in_kernel: Normalise queries and keys.
        rule: `seed` computes the rule of the seed document instead.

    Returns:
        The output [B, J, V], and the state after the position.

    Raises:
        ValueError: A shape or type, or the name of the rule, is wrong.
    """
    check_step(q, k, v, g, beta, state)
    scale = default_scale(scale, k.shape[-1], rule)
    inputs = standard_inputs(q, k, v, g, beta, use_qk_l2norm_in_kernel, rule)
    o, state = _step(*inputs, state.to(inputs[0].dtype))
    return (o * scale).to(v.dtype), state


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    state = g.exp()[..., None, None] * state
    error = v - (k[..., None, :] @ state)[..., 0, :]
    state = state + k[..., :, None] * (beta[..., None] * error)[..., None, :]
    return (q[..., None, :] @ state)[..., 0, :], state


@without_autocast
def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    rule: Rule = "standard",
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """Compute the same in chunks of `chunk` positions; see `kernels.gated_delta` for the other arguments."""
    packing, length, output_type = Packing(cu_seqlens), v.shape[1], v.dtype
    scale = default_scale(scale, k.shape[-1], rule)
    inputs = standard_inputs(q, k, v, g, beta, use_qk_l2norm_in_kernel, rule)
    unpacked = [packing.unpack(x).transpose(1, 2) for x in inputs]
    chunk = max(1, min(chunk, unpacked[0].shape[2]))  # short rows are not filled up with zeros
    q, k, v, g, beta = (_split(x, chunk) for x in unpacked)
    state = start_state(k, v, initial_state)

    g = g.clamp(min=FLOORS[g.dtype])
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=g.device).tril(-1)
    # Sums of g from j + 1 to i; differences of c would have gradients that cancel and leave their rounding errors
    between = torch.where(later, g[..., :, None], 0).cumsum(-2)
    decay = between.masked_fill(later.mT, -torch.inf).exp()  # masked before exp, which would overflow
    c = g.cumsum(-1)[..., None]
    system = (k @ k.mT) * decay * beta[..., None, :]  # only its strict lower triangle is read
    reads = torch.cat((v, c.exp() * k), -1)
    solved = torch.linalg.solve_triangular(system, reads, upper=False, unitriangular=True)
    own, carried = solved.split((v.shape[-1], k.shape[-1]), -1)  # E = own - carried S

    writes, kept = (decay[..., -1, :, None] * k).mT, c[..., -1:, :].exp()
    states, errors = [], []
    steps = (x.unbind(2) for x in (own, carried, beta[..., None], writes, kept))  # indexing has a slower gradient
    for own_m, carried_m, beta_m, writes_m, kept_m in zip(*steps, strict=True):
        states.append(state)
        errors.append((own_m - carried_m @ state) * beta_m)
        state = kept_m * state + writes_m @ errors[-1]
    within = (q @ k.mT) * decay
    o = c.exp() * (q @ torch.stack(states, 2)) + within @ torch.stack(errors, 2)
    o = packing.pack(o.flatten(2, 3).transpose(1, 2) * scale, length)
    return o.to(output_type), state if output_final_state else None


def _split(x: Tensor, chunk: int) -> Tensor:
    """Return x [N, J, T, ...] as chunks [N, J, M, C, ...]; positions of zeros, which change nothing, fill the last."""
    missing = -x.shape[2] % chunk if x.shape[2] else chunk
    x = pad(x, (*[0, 0] * (x.dim() - 3), 0, missing))
    return x.reshape(*x.shape[:2], x.shape[2] // chunk, chunk, *x.shape[3:])


def start_state(k: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    """Return the initial state, or zeros, of the dtype of the keys [N, J, ..., K] and values [N, J, ..., V]."""
    if initial_state is None:
        return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    return initial_state.to(k.dtype)


def standard_inputs(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, normalise: bool, rule: Rule = "standard"
) -> Inputs:
    """Return the inputs of the definition above in fp32, or in fp64 if the values are: normalised, J heads for all."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    if normalise:
        q, k = (x * (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt() for x in (q, k))
    if rule == "seed":
        q, k, v, g, beta = seed_inputs(k, v, g, beta)
    groups = v.shape[-2] // k.shape[-2]
    if groups > 1:
        q, k = q.repeat_interleave(groups, -2), k.repeat_interleave(groups, -2)
    return q, k, v, g, beta


def seed_inputs(k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Inputs:
    """Return the inputs with which the definition computes the rule of seed document 003.

    That rule, S <- exp(g_t) S + beta_t k_t (v_t - S^T k_t)^T, takes the error before the decay and reads with the key.
    """
    g = g.clamp(min=SEED_FLOOR)
    return k, k, v * g.exp()[..., None], g, beta * (-g).exp()
