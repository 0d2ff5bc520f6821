"""The gated delta rule over some positions, by the kernel or, for a hook on the state, one position after the other.

Shapes: B batch, T positions, H heads, K key width, V value width.
"""

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from kernels.gated_delta import chunk_gated_delta_rule, step_gated_delta_rule

Written = tuple[Tensor, Tensor, Tensor, Tensor]  # k_BTHK, v_BTHV, log_decay_BTH, beta_BTH

step = partial(step_gated_delta_rule, use_qk_l2norm_in_kernel=True)


def run_rule(
    q_BTHK: Tensor, written: Written, memory_BHKV: Tensor, site: nn.Module, negative: bool
) -> tuple[Tensor, Tensor]:
    """Return what the queries read, o_BTHV, and the state after the T positions.

    Args:
        q_BTHK: Queries.
        written: Keys, values, log-decays and writing strengths.
        memory_BHKV: The state before.
        site: The identity. If it has a hook, the state of every position passes it, before the query reads.
        negative: Whether beta may exceed 1.
    """
    if site._forward_hooks:
        return _run_by_position(q_BTHK, written, memory_BHKV, site)
    if q_BTHK.shape[1] == 1:
        q_BHK, k_BHK, v_BHV, g_BH, beta_BH = (x[:, 0] for x in (q_BTHK, *written))
        o_BHV, memory_BHKV = step(q_BHK, k_BHK, v_BHV, g_BH, beta_BH, memory_BHKV)
        return o_BHV[:, None], memory_BHKV
    o_BTHV, after_BHKV = chunk_gated_delta_rule(
        q_BTHK,
        *written,
        initial_state=memory_BHKV,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        allow_negative_eigenvalues=negative,
    )
    return o_BTHV, cast(Tensor, after_BHKV)


def _run_by_position(q_BTHK: Tensor, written: Written, memory_BHKV: Tensor, site: nn.Module) -> tuple[Tensor, Tensor]:
    outputs = []
    for q_BHK, k_BHK, v_BHV, g_BH, beta_BH in zip(*(x.unbind(1) for x in (q_BTHK, *written)), strict=True):
        memory_BHKV = site(step(q_BHK, k_BHK, v_BHV, g_BH, beta_BH, memory_BHKV)[1])
        nothing_BH = torch.zeros_like(g_BH)  # no decay and no write: the query reads what the hook has left
        outputs.append(step(q_BHK, k_BHK, v_BHV, nothing_BH, nothing_BH, memory_BHKV)[0])
    return torch.stack(outputs, 1), memory_BHKV
