"""What a gated delta mixer writes, read back: the state of any position, and what keys read from it.

Shapes: B rows, T positions, H heads, K key width, V value width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kernels.gated_delta import chunk_gated_delta_rule

SITES = ("query", "key", "value", "gates.log_decay", "gates.beta")


@dataclass(frozen=True)
class Writes:
    """The writes of one mixer: S <- exp(g_t) S; S <- S + beta_t k_t (v_t - S^T k_t)^T, from S = 0.

    Attributes:
        k_BTHK: Unit keys.
        v_BTHV: Values.
        log_decay_BTH: g.
        beta_BTH: Writing strengths.
    """

    k_BTHK: Tensor
    v_BTHV: Tensor
    log_decay_BTH: Tensor
    beta_BTH: Tensor

    @staticmethod
    def of(sites: Mapping[str, Tensor], shifted: bool) -> "Writes":
        """Return the writes of a forward.

        Args:
            sites: The outputs of the sites in `SITES`, by name; that of `query` is not used.
            shifted: Whether value t is written under the key, and with the beta, of position t - 1 (`shifted_value`).
        """
        # In at least fp32, for the state is
        k, v, g, beta = (sites[name].to(torch.promote_types(sites[name].dtype, torch.float32)) for name in SITES[1:])
        if shifted:
            k, beta = (torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) for x in (k, beta))
        return Writes(normalize(k, dim=-1), v, g, beta)

    def at(self, place_BN: Tensor) -> "Writes":
        """Return the writes at some positions of each row, as rows of N positions."""
        row_B1 = torch.arange(len(place_BN), device=place_BN.device)[:, None]
        return Writes(*(x[row_B1, place_BN] for x in (self.k_BTHK, self.v_BTHV, self.log_decay_BTH, self.beta_BTH)))

    def read(self, q_BTHK: Tensor) -> Tensor:
        """Return S_t^T q_t, [B, T, H, V], with S_t the state after the write at t."""
        return self._run(q_BTHK, self.log_decay_BTH, self.beta_BTH)[0]

    def state_before(self, position_B: Tensor) -> Tensor:
        """Return the state of each row before a position, [B, H, K, V]."""
        positions_T = torch.arange(self.k_BTHK.shape[1], device=position_B.device)
        past_BT1 = (positions_T < position_B[:, None])[..., None]
        # No decay and no write from the position on: the state stays
        return self._run(self.k_BTHK, self.log_decay_BTH * past_BT1, self.beta_BTH * past_BT1)[1]

    def _run(self, q_BTHK: Tensor, log_decay_BTH: Tensor, beta_BTH: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.k_BTHK, self.v_BTHV
        o_BTHV, state_BHKV = chunk_gated_delta_rule(
            q_BTHK, k, v, log_decay_BTH, beta_BTH, scale=1.0, output_final_state=True
        )
        return o_BTHV, cast(Tensor, state_BHKV)
