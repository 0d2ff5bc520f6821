"""A bank of orthogonal keys for markers.

Shapes: B batch, T positions, H heads, K key width and size of the bank.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from datamodules.errors import UserError, check_numbers


@dataclass(frozen=True)
class KeyBank:
    """Which tokens get their keys from the bank.

    Attributes:
        first_marker: The first marker.
        markers: Number of markers, which are successive tokens.
        slot: Which key a marker gets: by `order` the next one of the bank, as in the notes, or by `token` the one of
            the marker, which also has that key where it returns as a query.
        learned: Learn the bank; it stays orthogonal.
    """

    first_marker: int
    markers: int = 1
    slot: Literal["order", "token"] = "order"
    learned: bool = False

    def check(self, vocab_size: int) -> None:
        """Check that the markers are tokens.

        Raises:
            UserError: They are not; names `model.key_bank`.
        """
        check_numbers("model.key_bank", 0, vocab_size - 1, first_marker=self.first_marker)
        check_numbers("model.key_bank", 1, markers=self.markers)
        if self.first_marker + self.markers > vocab_size:
            raise UserError(
                f"model.key_bank: {self.markers} markers from token {self.first_marker} on are more than the "
                f"{vocab_size} tokens of model.vocab_size"
            )


class RowTokens:
    """The tokens of the forward that is running; the decoder sets them for the mixers.

    Attributes:
        tokens_BT: The tokens; None outside of a forward.
    """

    def __init__(self) -> None:
        self.tokens_BT: Tensor | None = None


class Bank(nn.Module):
    """Marker n has key n mod K of a head's K orthonormal keys; n counts from 0 in the row, or among the markers.

    Up to K markers then write without any interference, also if all of a row are the same token and n is the place in
    the row. A query of the model has to find the key: the bank sets no queries. A fixed bank has the unit
    vectors as keys: random weights of the projections have no preferred direction, so that another basis would change
    nothing. A learned bank turns them by the Cayley transform (I + A)^-1 (I - A), with A = W - W^T, which is orthogonal
    for each W; W begins as zero.

    Source: the notes' "learned orthogonal key bank", seed document 003.

    Args:
        heads: H.
        width: K.
        options: The markers.
        tokens: The tokens of the forward.
    """

    def __init__(self, heads: int, width: int, options: KeyBank, tokens: RowTokens):
        super().__init__()
        self.width, self.options, self.tokens = width, options, tokens
        self.turn = nn.Parameter(torch.zeros(heads, width, width)) if options.learned else None

    def forward(self, k_BTHK: Tensor, seen_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys with those of markers replaced, and the number of markers that each row has had after them.

        Args:
            k_BTHK: Keys.
            seen_B: Markers in each row before these positions.
        """
        tokens_BT = self.tokens.tokens_BT
        assert tokens_BT is not None  # the decoder sets them
        first = self.options.first_marker
        marked_BT = (tokens_BT >= first) & (tokens_BT < first + self.options.markers)
        after_BT = seen_B[:, None] + marked_BT.cumsum(1)
        slot_BT = after_BT - 1 if self.options.slot == "order" else tokens_BT - first
        slots_K = torch.arange(self.width, device=slot_BT.device)
        bank_BTK = (slot_BT[..., None] % self.width == slots_K).to(k_BTHK.dtype)
        if self.turn is None:
            bank_BTHK = bank_BTK[:, :, None]
        else:
            bank_BTHK = torch.einsum("btk,hkj->bthj", bank_BTK, self.keys(self.turn).to(k_BTHK.dtype))
        return torch.where(marked_BT[..., None, None], bank_BTHK, k_BTHK), after_BT[:, -1]

    @staticmethod
    def keys(turn_HKK: Tensor) -> Tensor:
        """Return the orthonormal keys of a learned bank, the rows of each head's matrix, [H, K, K]."""
        skew_HKK = turn_HKK - turn_HKK.mT
        identity_KK = torch.eye(turn_HKK.shape[-1], dtype=turn_HKK.dtype, device=turn_HKK.device)
        # Never singular, and a check would wait for the device
        keys_HKK: Tensor = torch.linalg.solve_ex(identity_KK + skew_HKK, identity_KK - skew_HKK).result
        return keys_HKK
