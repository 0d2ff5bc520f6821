"""What becomes of a question on its way from the source's states to the target's soft tokens.

Shapes: B batch, S source positions, C source width, K soft tokens, D target width.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Codes:
    """The discrete codes of soft tokens.

    Attributes:
        index_BK: The code of each soft token.
        commitment_BK: Squared distance of each soft token from its code, a mean over D, for codebook and encoder.
    """

    index_BK: Tensor
    commitment_BK: Tensor


@dataclass
class Encoding:
    """A batch of questions, from the source's states to soft tokens.

    Attributes:
        states_BSC: The normalised states of the source.
        bridged_BKD: The output of the bridge.
        codes: The codes of the bottleneck; None without a bottleneck.
        soft_BKD: The soft tokens, zero after the last one of a row.
        seed_B: The seed of each question's noise, where the bridge samples.
    """

    states_BSC: Tensor
    bridged_BKD: Tensor
    codes: Codes | None
    soft_BKD: Tensor
    seed_B: Tensor | None
