"""Discrete bottlenecks between the bridge and the target: soft tokens are replaced by codes.

Shapes: B batch, K soft tokens, D target width, F factors of a code, V values of a factor.
"""

import math
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, SimVQ

from lightning_modules.telepathy.code_maps import Residual, SlowMap, reader
from lightning_modules.telepathy.code_use import CodeUse
from lightning_modules.telepathy.encoding import Codes
from lightning_modules.telepathy.flaws import Flaw
from lightning_modules.telepathy.output_scale import rms_unit

BottleneckName = Literal["none", "vq", "fsq"]

CODES = 4096  # of the codebook, as in the notes
LEVELS = (8, 8, 8, 6, 5)  # about 2^14 codes (Mentzer et al. 2023, table 1)
ENCODER_WEIGHT = 0.25  # of the encoder's side of the commitment, as in the notes (van den Oord et al. 2017)
TINY = 1 / CODES  # bound of the notes' first codebook, far below the size of its inputs
LATE = 0.8  # of training, after which soft tokens become codes
RENEWED = 64  # codes of a step before that
SHARPNESS = 4.0  # of the soft assignment to levels: the next one gets e^-4 of the share


class Bottleneck(nn.Module):
    """No bottleneck. Subclasses replace each soft token by a code.

    Attributes:
        size: Number of codes; 0 without a bottleneck.
        is_late: Whether soft tokens become codes in the last part of the training alone.
        progress: How much of the training is over, from 0 to 1, which the module sets.
        use: The use of codes on the held-out problems.
    """

    size = 0
    is_late = False
    progress = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.use = CodeUse(self.size)

    def forward(self, soft_BKD: Tensor, mask_BK: Tensor) -> tuple[Tensor, Codes | None]:
        """Return the vectors for the target, and their codes.

        Args:
            soft_BKD: The soft tokens.
            mask_BK: True at real ones.
        """
        return soft_BKD, None

    def shares(self, soft_BKD: Tensor) -> Tensor:
        """Return share_BKFV, how much of a soft token goes to each value of each factor of a code, with gradients.

        Without codes there are no factors: F = 0.
        """
        return soft_BKD.new_zeros(*soft_BKD.shape[:2], 0, 1)


class VectorBottleneck(Bottleneck):
    """Vector quantisation in fp32: each soft token becomes the nearest vector of a codebook.

    The codebook is a learned map of fixed random vectors (SimVQ, Zhu et al. 2024), so a code that no input has chosen
    still moves with the others. Gradients pass by the rotation trick (Fifty et al. 2024). Inputs are brought to root
    mean square 1, where the codes start as well.

    Codes come late. In the first part of training soft tokens go on as they are, and those that lie farthest from their
    codes become codes themselves, in the place of the oldest ones: a bridge whose soft tokens are codes from the start
    learns hardly any name, and random codes lie far from what it learned. The codes of the notes, which the flaws put
    back, are there from the start. Ranks have the codes of rank 0, as DDP keeps all buffers equal.

    Args:
        width: D.
        codebook_scale: Reproduce the notes' codebook: it starts within ±1/4096, and inputs keep their own size.
        bare: Reproduce the notes' codes: they go to the target as they are, without `reader`.
    """

    size = CODES
    oldest: Tensor

    def __init__(self, width: int, codebook_scale: bool = False, bare: bool = False):
        super().__init__()
        self.has_own_scale = codebook_scale
        factor = TINY / 3**0.5 if codebook_scale else 1.0  # the standard deviation of a uniform draw within ±1/4096
        codes = {"init_fn": lambda codes_VD: codes_VD * (width**0.5 * factor)}
        self.is_late = not (codebook_scale or bare)
        self.quantizer = SimVQ(width, CODES, codebook_transform=SlowMap(width), **codes)
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))
        self.read = Residual(width) if not bare else nn.Identity()

    def _scaled(self, soft_BKD: Tensor) -> Tensor:
        return soft_BKD.float() if self.has_own_scale else rms_unit(soft_BKD)

    def forward(self, soft_BKD: Tensor, mask_BK: Tensor) -> tuple[Tensor, Codes | None]:
        """Return vectors for the target. Gradients pass to the soft tokens, those of the commitment to both sides."""
        with torch.autocast(soft_BKD.device.type, enabled=False):
            soft_BKD = self._scaled(soft_BKD)
            is_early = self.is_late and self.training and self.progress < LATE
            if is_early:
                self._renew(soft_BKD.detach().flatten(0, 1), mask_BK.flatten())
            vectors_BKD, index_BK, _ = self.quantizer(soft_BKD)  # its own commitment would count padding
            code_BKD = self.quantizer.codebook[index_BK]
            commitment_BK = (code_BKD - soft_BKD.detach()).square().mean(-1)
            commitment_BK = commitment_BK + ENCODER_WEIGHT * (code_BKD.detach() - soft_BKD).square().mean(-1)
            if is_early:
                vectors_BKD, commitment_BK = soft_BKD, 0 * commitment_BK  # DDP waits for the gradient of the map
            return self.read(vectors_BKD), Codes(index_BK, commitment_BK)

    @torch.no_grad()
    def _renew(self, soft_ND: Tensor, real_N: Tensor) -> None:
        """Put the real soft tokens that lie farthest from their codes in the place of the oldest codes."""
        far_N = torch.cdist(soft_ND, self.quantizer.codebook).amin(1).where(real_N, -1.0).nan_to_num(-1.0)
        far_R, chosen_R = far_N.topk(min(RENEWED, len(far_N)))
        place_R = (self.oldest + torch.arange(len(chosen_R), device=soft_ND.device)) % CODES
        codes, new_RD = self.quantizer.frozen_codebook, soft_ND[chosen_R] @ self.quantizer.code_transform.base_DD
        codes[place_R] = new_RD.where((far_R >= 0)[:, None], codes[place_R])  # base_DD is orthogonal
        self.oldest.add_((far_R >= 0).sum()).remainder_(CODES)

    def shares(self, soft_BKD: Tensor) -> Tensor:
        """Return softmax(-d² / √D) over the codes, with d the distance: there is one factor."""
        with torch.autocast(soft_BKD.device.type, enabled=False):
            soft_BKD, codes_VD = self._scaled(soft_BKD), self.quantizer.codebook
            # The soft token's own square is the same for all codes
            squares_BKV = codes_VD.square().sum(-1) - 2 * soft_BKD @ codes_VD.T
            share_BKV: Tensor = (-squares_BKV / soft_BKD.shape[-1] ** 0.5).softmax(-1)
            return share_BKV[..., None, :]


class ScalarBottleneck(Bottleneck):
    """Finite scalar quantisation in fp32 (Mentzer et al. 2023): five numbers, each rounded to one of 5 to 8 levels.

    Args:
        width: D.
        bare: Reproduce the notes' codes: a linear map leads from the five numbers to the target, and not `reader`.
    """

    size = math.prod(LEVELS)

    def __init__(self, width: int, bare: bool = False):
        super().__init__()
        self.quantizer = FSQ(list(LEVELS), dim=width)
        if not bare:
            self.quantizer.project_out = reader(len(LEVELS), width)

    def forward(self, soft_BKD: Tensor, mask_BK: Tensor) -> tuple[Tensor, Codes | None]:
        """Return the rounded vectors, with gradients as if they were not rounded. There is nothing to commit to."""
        with torch.autocast(soft_BKD.device.type, enabled=False):
            vectors_BKD, index_BK = self.quantizer(rms_unit(soft_BKD))
        return vectors_BKD, Codes(index_BK.long(), soft_BKD.new_zeros(soft_BKD.shape[:2], dtype=torch.float32))

    def shares(self, soft_BKD: Tensor) -> Tensor:
        """Return softmax(-4 (u - l)²) over the levels l of each factor, with u the number that is rounded."""
        with torch.autocast(soft_BKD.device.type, enabled=False):
            count_F = self.quantizer._levels  # on the device already
            half_F = (count_F - 1) * (1 + 1e-3) / 2  # the library's bound, on levels from 0 to count - 1
            offset_F = 0.5 * (count_F % 2 == 0)
            shifted_BKF = self.quantizer.project_in(rms_unit(soft_BKD)) + (offset_F / half_F).atanh()
            number_BKF = shifted_BKF.tanh() * half_F - offset_F + count_F // 2
            level_V = torch.arange(max(LEVELS), device=soft_BKD.device)
            far_BKFV = SHARPNESS * (number_BKF[..., None] - level_V).square()
            share_BKFV: Tensor = (-far_BKFV).masked_fill(level_V >= count_F[:, None], -torch.inf).softmax(-1)
            return share_BKFV


class UntrainedOutput(Bottleneck):
    """A fixed random map, as the notes' flow bridges had behind the part that their loss trained.

    Args:
        width: D.
    """

    def __init__(self, width: int):
        super().__init__()
        self.map = nn.Linear(width, width, bias=False).requires_grad_(False)
        nn.init.normal_(self.map.weight, std=width**-0.5)

    def forward(self, soft_BKD: Tensor, mask_BK: Tensor) -> tuple[Tensor, Codes | None]:
        """Return the mapped vectors."""
        return self.map(soft_BKD), None


def make_bottleneck(name: BottleneckName, width: int, flaws: Collection[Flaw]) -> Bottleneck:
    """Return a bottleneck for soft tokens of a width."""
    match name:
        case "vq":
            return VectorBottleneck(width, "codebook_scale" in flaws, "bare_codes" in flaws)
        case "fsq":
            return ScalarBottleneck(width, "bare_codes" in flaws)
        case _:  # "none", or the null of a config
            return UntrainedOutput(width) if "untrained_output" in flaws else Bottleneck()
