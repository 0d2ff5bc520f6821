"""The gated delta rule of Gated DeltaNet: a memory that overwrites what a key reads, and forgets.

Signatures and conventions are those of flash-linear-attention. The Triton kernels run on a GPU, the reference in plain
PyTorch elsewhere. `reference.py` has the formulas.
"""

import torch
from torch import Tensor

from kernels.gated_delta import reference
from kernels.gated_delta.checks import check_backend, check_inputs
from kernels.gated_delta.options import Backend, Rule, default_scale
from kernels.gated_delta.reference import step_gated_delta_rule

__all__ = ["chunk_gated_delta_rule", "recurrent_gated_delta_rule", "step_gated_delta_rule"]


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
    allow_negative_eigenvalues: bool = True,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gated delta rule over whole sequences, in chunks; for training and for reading a prompt.

    At each position, with a state S [K, V] per value head: S decays to exp(g) S, the error e = v - S^T k is written as
    S + beta k e^T, and the output is scale S^T q.

    Args:
        q: Queries [B, T, H, K], fp32, bf16 or fp16, or fp64 for the reference.
        k: Keys, as the queries.
        v: Values [B, T, J, V] of the same type. J is a multiple of H; value head j reads with query head j // (J / H).
        g: Log-decays [B, T, J], at most 0.
        beta: Writing strengths [B, T, J], between 0 and 2.
        scale: Factor of the outputs; 1 / sqrt(K) by default.
        initial_state: States before the first position [N, J, K, V] in fp32, for N sequences; zeros by default. N is B,
            or the number of packed sequences.
        output_final_state: Return the states after the last positions too.
        use_qk_l2norm_in_kernel: Normalise queries and keys: x / sqrt(|x|^2 + 1e-6).
        cu_seqlens: Bounds [N + 1] of N sequences that lie one behind the other in a batch of one: 0, and where each
            ends. Empty sequences are allowed. Outputs after the last sequence are zero.
        rule: `seed` computes S <- exp(g) S + beta k (v - S^T k)^T, the rule of seed document 003, with the error of
            the state before its decay, which reads with the key: q is not used, and scale is 1 by default.
        allow_negative_eigenvalues: Betas may exceed 1. If they never do, False makes the kernels faster for bf16:
            errors of a write then fade with later writes, so that products need less precision.
        backend: `triton` or `reference`; by default Triton where the tensors are on a GPU and not of fp64.

    Returns:
        The outputs [B, T, J, V] of the type of v, and the states [N, J, K, V] after the last positions or None.

    Raises:
        ValueError: A shape, type or size is wrong; one sentence says which.
    """
    check_inputs(q, k, v, g, beta, initial_state, cu_seqlens)
    options = use_qk_l2norm_in_kernel, cu_seqlens
    if check_backend(backend, v) == "reference":
        return reference.chunk_gated_delta_rule(
            q, k, v, g, beta, scale, initial_state, output_final_state, *options, rule
        )
    from kernels.gated_delta.function import gated_delta  # Triton is not installed everywhere

    scale, output_type = default_scale(scale, k.shape[-1], rule), v.dtype
    if rule == "seed":
        wide = torch.float32 if v.dtype == torch.float16 else v.dtype  # v exp(g) is below the range of fp16
        k, v = k.to(wide), v.to(wide)
        q, k, v_wide, g, beta = reference.seed_inputs(k, v, g.float(), beta.float())
        v = v_wide.to(wide)
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    initial_state = None if initial_state is None else initial_state.contiguous()
    negative = allow_negative_eigenvalues or rule == "seed"  # whose betas are divided by the decay
    how = scale, use_qk_l2norm_in_kernel, negative, output_final_state
    o, final, *_ = gated_delta(q, k, v, g, beta, initial_state, cu_seqlens, *how)
    return o.to(output_type), final if output_final_state else None


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
    """Compute the same as `chunk_gated_delta_rule`, one position after the other: the definition, slow everywhere."""
    check_inputs(q, k, v, g, beta, initial_state, cu_seqlens)
    return reference.recurrent_gated_delta_rule(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, rule
    )
