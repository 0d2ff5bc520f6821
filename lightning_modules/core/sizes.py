"""Checks of the sizes of a network, as a user sets them under `model`."""

from collections.abc import Callable, Mapping
from inspect import signature

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.errors import SIZE, UserError, check_numbers

MOST_CONVOLVED = 64  # positions of a convolution, which is meant to be short


def check_sizes(**sizes: int | None) -> None:
    """Check sizes of a network; None stands for a default.

    Raises:
        UserError: A size is below 1 or above 2^24; names `model.<size>`.
    """
    check_numbers("model", 1, SIZE, **sizes)


def check_convolutions(**widths: int | None) -> None:
    """Check the positions that short convolutions read; None stands for a default, 0 for no convolution.

    Raises:
        UserError: A width is below 0 or above 64; names `model.<width>`.
    """
    check_numbers("model", 0, MOST_CONVOLVED, **widths)


def check_heads(width: int, heads: int) -> None:
    """Check that heads of equal width fill the width.

    Raises:
        UserError: They do not.
    """
    if width % heads:
        raise UserError(f"model.heads must divide model.width: {heads} does not divide {width}")


def warn_of_unused(pattern: str, module: Callable[..., object], **options: Mapping[str, object]) -> None:
    """Warn of options of mixers that are not in a pattern.

    Args:
        pattern: The pattern.
        module: The class of the module, whose signature has the defaults.
        **options: The options by name, for the letter of each mixer.
    """
    arguments = signature(module).parameters
    for letter, of_mixer in options.items():
        unused = [f"model.{name}" for name, value in of_mixer.items() if value != arguments[name].default]
        if unused and letter not in pattern:
            rank_zero_warn(f"model.pattern {pattern} has no {letter}, so these change nothing: {', '.join(unused)}")
