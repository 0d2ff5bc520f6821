"""What is wrong with the options of a model, in one sentence."""

from collections.abc import Mapping

from datamodules.errors import UserError, check_multiples
from kernels.gated_delta.checks import ALIGNMENT, WIDEST
from lightning_modules.core.sizes import check_heads


def check_pattern(pattern: str, window_reads_state: bool) -> None:
    """Check the letters of a pattern.

    Raises:
        UserError: There is none, there is another letter than G and S, or no S can read a state.
    """
    if not pattern or (unknown := sorted(set(pattern) - set("GS"))):
        wrong = f"'{unknown[0]}' is neither" if pattern else "it is empty"
        raise UserError(
            f"model.pattern must have one letter per block, G (gated delta) or S (window attention): {wrong}"
        )
    if window_reads_state and "GS" not in pattern:
        raise UserError(f"model.window_reads_state needs an S behind a G in model.pattern, which is {pattern}")


def check_head_widths(width: int, heads: int, pattern: str) -> None:
    """Check that heads divide the width, and that those of window attention can have rotary positions.

    Raises:
        UserError: They do not.
    """
    check_heads(width, heads)
    if "S" in pattern and width // heads % 2:
        raise UserError(f"model.width / model.heads must be even for rotary positions, not {width // heads}")


def check_kernel(pattern: str, **sizes: int) -> None:
    """Check sizes that the kernel of the gated delta rule has to take, if the pattern has a G.

    Raises:
        UserError: One is too small, too large or no multiple of 4; names `model.<size>`.
    """
    if "G" in pattern:
        check_multiples("model", ALIGNMENT, WIDEST, **sizes)


def check_delta_options(pattern: str, keys: str, of_tokens: Mapping[str, object], **options: object) -> None:
    """Check options of the gated delta rule against each other and against the pattern.

    Args:
        pattern: The pattern.
        keys: What keys are made of.
        of_tokens: Options of keys that are made of tokens, by name; those that are None or False are not set.
        **options: Other options that need a G in the pattern, likewise.

    Raises:
        UserError: An option would change nothing; names it.
    """
    if keys == "position" and (named := _set(of_tokens)):
        raise UserError(f"model.{named[0]} needs keys of tokens: set model.keys to token or both, not position")
    named = _set({**of_tokens, **options, "keys": keys != "token"})
    if named and "G" not in pattern:
        raise UserError(f"model.{named[0]} needs a G in model.pattern, which is {pattern}")


def _set(options: Mapping[str, object]) -> list[str]:
    return [name for name, value in options.items() if value is not None and value is not False]


def check_final_state(final_state: bool, window_reads_state: bool, piece_len: int | None) -> None:
    """Check that a model that reads the state after the last position reads a state, and whole rows.

    Raises:
        UserError: It does not.
    """
    if final_state and not window_reads_state:
        raise UserError("model.reproduce_flaws: final_state needs model.window_reads_state true")
    if final_state and piece_len is not None:
        raise UserError(
            "model.piece_len: a row cannot be read in pieces with model.reproduce_flaws final_state, for each position "
            "reads the state after the last one"
        )
