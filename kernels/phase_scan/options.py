"""What every form of the phase scan shares."""

from typing import Literal

Backend = Literal["reference", "triton"]

EPSILON = 1e-6  # added to a sum of masses before the division by it
