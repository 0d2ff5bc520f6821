"""The recurrence S_t = gate_t S_{t-1} + write_t in chunks, for real or complex numbers, over all or the last positions.

In a chunk, the recurrence starts from zero, and what entered the chunk is added, times the product of the gates so far.
With a window, the chunk is as long as the window: what entered is the end of the chunk before, from the first position
that is still in the window. With gates of at most 1, no number grows beyond the sums, and nothing is divided or
subtracted.

Shapes: N sequences, T positions, D channels, W window, C positions of a chunk, M chunks.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def windowed_scan(
    gate_NTD: Tensor | None,
    write_NTD: Tensor,
    log_decay_NTD: Tensor | None,
    before: Tensor | None,
    window: int | None,
    chunk: int,
) -> Tensor:
    """Return S_t = gate_t S_{t-1} + write_t, over the last `window` positions only if there is one.

    The log-decay is the logarithm of the real part of the gates, and None where this is 1. `before` is S_0 [N, D], or
    the terms of the last positions [N, W - 1, D]. With a window, gates that are None are 1.
    """
    T, first = write_NTD.shape[1], 0
    if T == 0:
        return write_NTD
    if gate_NTD is None:
        assert window is not None
        return _window_sums(write_NTD, before, window)
    if before is None and window is not None and window >= T:
        window = None
    if window is not None and before is not None:  # the terms are positions, which pass on what they hold
        first = window - 1
        gate_NTD = torch.cat((torch.ones_like(before), gate_NTD), 1)
        write_NTD = torch.cat((before, write_NTD), 1)
    chunk = min(chunk, T) if window is None else window
    gates, writes = (_split(x, chunk).unbind(2) for x in (gate_NTD, write_NTD))
    own, passed = [writes[0]], [gates[0]]
    for gate, write in zip(gates[1:], writes[1:], strict=True):
        own.append(torch.addcmul(write, gate, own[-1]))
        passed.append(gate * passed[-1])
    if window is None:
        missing = None if log_decay_NTD is None else _missing(passed[-1], _split(log_decay_NTD, chunk))
        entered = _carries(passed[-1], own[-1], missing, before)[:, :, None]
    else:
        entered = _left_of_previous(gates, writes)
    memory = torch.addcmul(torch.stack(own, 2), torch.stack(passed, 2), entered)
    return memory.flatten(1, 2)[:, first : first + T]


def _window_sums(write_NTD: Tensor, before: Tensor | None, window: int) -> Tensor:
    """Return the sums over the last positions: of the chunk so far, and of what is left of the chunk before."""
    T, first = write_NTD.shape[1], 0
    if before is not None:
        write_NTD, first = torch.cat((before, write_NTD), 1), window - 1
    write_NMCD = _split(write_NTD, min(window, write_NTD.shape[1]))
    left_NMCD = write_NMCD[:, :-1, 1:].flip(2).cumsum(2).flip(2)
    return (write_NMCD.cumsum(2) + pad(left_NMCD, (0, 0, 0, 1, 1, 0))).flatten(1, 2)[:, first : first + T]


def _missing(passed_NMD: Tensor, log_decay_NMCD: Tensor) -> Tensor:
    """Return what the products of gates lack to exp of the sums of log-decays, as rounding errors.

    Where decays are constant and weak, these errors are all the same, and would add up over hundreds of chunks.
    """
    return torch.expm1(log_decay_NMCD.detach().sum(2)) - (passed_NMD.detach().real - 1)


def _carries(passed_NMD: Tensor, own_NMD: Tensor, missing_NMD: Tensor | None, before: Tensor | None) -> Tensor:
    """Return what enters each chunk: S at the end of the chunk before it."""
    carry = torch.zeros_like(own_NMD[:, 0]) if before is None else before
    missing = passed_NMD.shape[1] * [None] if missing_NMD is None else missing_NMD.unbind(1)
    carries = []
    for passed, own, rest in zip(passed_NMD.unbind(1), own_NMD.unbind(1), missing, strict=True):
        carries.append(carry)
        after = torch.addcmul(own, passed, carry)
        carry = after if rest is None else after + rest * carry
    return torch.stack(carries, 1)


def _left_of_previous(gates: tuple[Tensor, ...], writes: tuple[Tensor, ...]) -> Tensor:
    """Return [N, M, C, D]: at each position, the sum of the chunk before from the first position in the window on."""
    left = [torch.zeros_like(writes[0])]  # of the last position, whose window is its own chunk
    passed = torch.ones_like(gates[0])
    for gate, write in zip(gates[:0:-1], writes[:0:-1], strict=True):
        left.append(torch.addcmul(left[-1], passed, write))
        passed = passed * gate
    left_NMCD = torch.stack(left[::-1], 2)
    return torch.cat((torch.zeros_like(left_NMCD[:, :1]), left_NMCD[:, :-1]), 1)


def _split(x: Tensor, chunk: int) -> Tensor:
    """Return x [N, T, D] as chunks [N, M, C, D]; zeros fill the last."""
    x = pad(x, (0, 0, 0, -x.shape[1] % chunk))
    return x.reshape(x.shape[0], x.shape[1] // chunk, chunk, x.shape[2])


def last_state(
    gate_NTD: Tensor | None,
    write_NTD: Tensor,
    before: Tensor | None,
    memory_NTD: Tensor,
    lengths_N: Tensor,
    window: int | None,
) -> Tensor:
    """Return S after the last position of each sequence, or the terms of its last W - 1 positions."""
    N, _, D = write_NTD.shape
    if before is None:
        before = write_NTD.new_zeros((N, D) if window is None else (N, window - 1, D))
    if window is None:
        return _rows(torch.cat((before[:, None], memory_NTD), 1), lengths_N[:, None])[:, 0]
    places_NW = lengths_N[:, None] + torch.arange(window - 1, device=lengths_N.device)
    terms = _rows(torch.cat((before, write_NTD), 1), places_NW)
    if gate_NTD is None or window == 1:
        return terms
    gates = _rows(torch.cat((torch.ones_like(before), gate_NTD), 1), places_NW).unbind(1)
    passed = [torch.ones_like(gates[0])]
    for gate in gates[:0:-1]:
        passed.append(passed[-1] * gate)
    return terms * torch.stack(passed[::-1], 1)


def _rows(x: Tensor, places_NK: Tensor) -> Tensor:
    """Return the rows [N, K, D] of x at some positions of each sequence."""
    return x.gather(1, places_NK[:, :, None].expand(-1, -1, x.shape[-1]))
