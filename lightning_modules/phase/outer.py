"""The outer-product memory of the phase mixer: each frequency of a head holds a whole value.

Shapes: B batch, T positions, H heads, K frequencies of a head, V value width, F = 2K real and imaginary parts, N
chunks, C positions of a chunk, P = W - 1 positions of the past in a window W, S = P + C.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 64  # positions whose phases are summed from zero, which keeps fp32 exact to about 1e-5


def outer_scan(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    omega_BTHK: Tensor,
    read_BTHK: Tensor,
    write_BTHK: Tensor,
    log_decay_BTH: Tensor,
    memory_BHFV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return o_t = sum_s gamma_{s+1..t} sum_k q_tk k_sk cos(phi_tk + r_tk - phi_sk - w_sk) v_s, and the last memory.

    The sum is over s <= t, and phi = cumsum(omega). The memory is sum_s gamma_{s+1..t} k_s e^{i (phi_s + w_s - phi_t)}
    v_s, real parts before imaginary parts; its frame turns with phi, so no phase grows with the row. The cost is linear
    in T.

    Args:
        q_BTHK: Strength with which each frequency is read.
        k_BTHK: Strength with which it is written.
        v_BTHV: Values.
        omega_BTHK: Advance of the phase at each position, in radians.
        read_BTHK: r, the offset of the reader.
        write_BTHK: w, the offset of the writer.
        log_decay_BTH: log gamma, at most 0.
        memory_BHFV: The memory before.
    """
    length, chunk = q_BTHK.shape[1], min(CHUNK, q_BTHK.shape[1])
    rows = q_BTHK, k_BTHK, v_BTHV, omega_BTHK, read_BTHK, write_BTHK, log_decay_BTH[..., None]
    q_BNHCK, k_BNHCK, v_BNHCV, omega_BNHCK, read_BNHCK, write_BNHCK, g_BNHC1 = _chunks(rows, chunk)
    phase_BNHCK, sum_BNHC1 = omega_BNHCK.cumsum(3), g_BNHC1.cumsum(3)
    q_BNHCF, k_BNHCF = _turned(q_BNHCK, phase_BNHCK + read_BNHCK), _turned(k_BNHCK, phase_BNHCK + write_BNHCK)
    hidden_CC = torch.ones(chunk, chunk, dtype=torch.bool, device=v_BTHV.device).triu(1)
    decay_BNHCC = (sum_BNHC1 - sum_BNHC1.mT).masked_fill(hidden_CC, -torch.inf).exp()
    inner_BNHCV = ((q_BNHCF @ k_BNHCF.mT) * decay_BNHCC) @ v_BNHCV
    new_BNHFV = (k_BNHCF * (sum_BNHC1[..., -1:, :] - sum_BNHC1).exp()).mT @ v_BNHCV
    before = []
    for new_BHFV, phase_BHCK, sum_BHC1 in zip(
        new_BNHFV.unbind(1), phase_BNHCK.unbind(1), sum_BNHC1.unbind(1), strict=True
    ):
        before.append(memory_BHFV)
        memory_BHFV = rotate_back(memory_BHFV * sum_BHC1[..., -1:, :].exp() + new_BHFV, phase_BHCK[..., -1, :, None])
    outer_BNHCV = (q_BNHCF @ torch.stack(before, 1)) * sum_BNHC1.exp()
    o_BTHV = (inner_BNHCV + outer_BNHCV).transpose(2, 3).flatten(1, 2)[:, :length]
    return o_BTHV, memory_BHFV


def outer_window(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    omega_BTHK: Tensor,
    read_BTHK: Tensor,
    write_BTHK: Tensor,
    log_decay_BTH: Tensor,
    past: tuple[Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the same sum over t - W < s <= t, and the last W - 1 keys and values.

    Args:
        q_BTHK: As in `outer_scan`, like the arguments that follow.
        k_BTHK: See there.
        v_BTHV: See there.
        omega_BTHK: See there.
        read_BTHK: See there.
        write_BTHK: See there.
        log_decay_BTH: See there.
        past: Keys [B, H, P, F], decayed and in the frame of the position before, and values [B, H, P, V].
    """
    size, outputs = max(CHUNK, past[0].shape[2] + 1), []
    rows = q_BTHK, k_BTHK, v_BTHV, omega_BTHK, read_BTHK, write_BTHK, log_decay_BTH[..., None]
    pieces, width = [torch.split(x.transpose(1, 2), size, 2) for x in rows], past[0].shape[2]
    for q_BHCK, k_BHCK, v_BHCV, omega_BHCK, read_BHCK, write_BHCK, g_BHC1 in zip(*pieces, strict=True):
        phase_BHCK, sum_BHC1 = omega_BHCK.cumsum(2), g_BHC1.cumsum(2)
        q_BHCF = _turned(q_BHCK, phase_BHCK + read_BHCK)
        k_BHSF = torch.cat([past[0], _turned(k_BHCK, phase_BHCK + write_BHCK)], 2)
        v_BHSV, sum_BHS1 = torch.cat([past[1], v_BHCV], 2), pad(sum_BHC1, (0, 0, width, 0))
        index_S = torch.arange(k_BHSF.shape[2], device=v_BTHV.device)
        distance_CS = index_S[width:, None] - index_S
        decay_BHCS = (sum_BHC1 - sum_BHS1.mT).masked_fill((distance_CS < 0) | (distance_CS > width), -torch.inf).exp()
        outputs.append(((q_BHCF @ k_BHSF.mT) * decay_BHCS) @ v_BHSV)
        k_BHSF = k_BHSF * (sum_BHC1[..., -1:, :] - sum_BHS1).exp()
        k_BHSF = rotate_back(k_BHSF.mT, phase_BHCK[..., -1, :, None]).mT
        start = k_BHSF.shape[2] - width
        past = k_BHSF[:, :, start:], v_BHSV[:, :, start:]
    return torch.cat(outputs, 2).transpose(1, 2), past


def _turned(x: Tensor, phase: Tensor) -> Tensor:
    """Return x e^{i phase}, real parts before imaginary parts."""
    return torch.cat([x * phase.cos(), x * phase.sin()], -1)


def rotate_back(x_BHFX: Tensor, phase_BHK1: Tensor) -> Tensor:
    """Return x e^{-i phase}, with real parts before imaginary parts on the axis F."""
    real, imaginary = x_BHFX.chunk(2, 2)
    cos, sin = phase_BHK1.cos(), phase_BHK1.sin()
    return torch.cat([real * cos + imaginary * sin, imaginary * cos - real * sin], 2)


def _chunks(rows: Sequence[Tensor], chunk: int) -> list[Tensor]:
    """Return x_BTHX as x_BNHCX; zeros fill the last chunk, and neither write nor turn nor decay."""
    missing = -rows[0].shape[1] % chunk
    padded = [pad(x, (0, 0, 0, 0, 0, missing)) for x in rows]
    return [x.view(len(x), -1, chunk, *x.shape[2:]).transpose(2, 3) for x in padded]
