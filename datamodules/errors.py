"""The exception for mistakes of the user, and checks of numbers that a user set."""

import math
import sys

MOST = 2**63 - 1  # the largest integer of a tensor: the upper bound of numbers without another one
SIZE = 2**24  # upper bound of sizes, of which a larger one is a slip of the finger and would take hours or all memory
SEEDS = 2**64 - 1  # the largest seed
POSITIVE = sys.float_info.min  # lower bound of numbers that must not be 0


class UserError(ValueError):
    """A mistake of the user, such as a wrong setting or a missing file; its message is one sentence for the terminal.

    The command line prints the message and exits with code 2. Every other exception keeps its stack trace.
    """


def check_numbers(owner: str, least: float, most: float = MOST, /, **numbers: float | None) -> None:
    """Check that numbers are finite and lie between two bounds, both included; None stands for a default and passes.

    Args:
        owner: What the numbers belong to, such as `data`, for the message; `--` for options of a command.
        least: The lower bound; `POSITIVE` for a float that must not be 0.
        most: The upper bound.
        **numbers: The numbers by their names in the config.

    Raises:
        UserError: A number lies outside, or is NaN or infinite; names `<owner>.<name>` or `--<name>`.
    """
    for name, number in numbers.items():
        if number is None or least <= number <= most:
            continue
        if number != number or abs(number) == math.inf:
            wanted = "a finite number"
        elif number > most:
            wanted = f"at most {most}"
        else:
            wanted = "positive" if least == POSITIVE else f"at least {least}"
        place = f"--{name}" if owner == "--" else f"{owner}.{name}"
        raise UserError(f"{place} must be {wanted}, not {number}")


def check_multiples(owner: str, factor: int, most: int, /, **numbers: int) -> None:
    """Check that numbers are multiples of a factor, from the factor itself up to a bound.

    Args:
        owner: What the numbers belong to, such as `data`, for the message.
        factor: The factor.
        most: The bound.
        **numbers: The numbers by their names in the config.

    Raises:
        UserError: A number lies outside or is no multiple; names `<owner>.<name>` and the nearest multiple.
    """
    check_numbers(owner, factor, most, **numbers)
    for name, number in numbers.items():
        if number % factor:
            nearest = max(factor, round(number / factor) * factor)
            raise UserError(f"{owner}.{name} must be a multiple of {factor}, such as {nearest}, not {number}")
