"""The pattern of a network: one letter for the mixer of each block."""

from datamodules.errors import SIZE, UserError
from kernels.gated_delta.checks import ALIGNMENT, WIDEST
from lightning_modules.core.sizes import check_heads

LETTERS = {"P": "phase", "G": "gated delta", "A": "attention", "L": "LSTM"}
HEADS = {"A": (2, SIZE), "G": (ALIGNMENT, WIDEST)}  # what divides the width of a head, and the widest; A turns pairs


def check_pattern(pattern: str, width: int, heads: int) -> None:
    """Check the letters, and the heads.

    Raises:
        UserError: The pattern is empty or has another letter, heads do not divide the width, or a mixer does not take
            heads of their width.
    """
    check_heads(width, heads)
    head_width = width // heads
    letters = ", ".join(f"{letter} ({name})" for letter, name in LETTERS.items())
    wrong = next((f"'{letter}' is none of them" for letter in pattern if letter not in LETTERS), "")
    if wrong or not pattern:
        raise UserError(f"model.pattern must have one letter per block, of {letters}: {wrong or 'it is empty'}")
    for letter, (multiple, widest) in HEADS.items():
        if letter in pattern and (head_width % multiple or head_width > widest):
            limit = f" up to {widest}" if widest < SIZE else ""
            wanted = f"a multiple of {multiple}{limit} for {letter} in model.pattern"
            raise UserError(f"model.width / model.heads must be {wanted}, not {head_width}")
