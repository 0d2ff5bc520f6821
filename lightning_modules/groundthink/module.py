"""The groundthink line: needles in the delta-rule state of a hybrid of a linear recurrence and window attention.

Shapes: D width, H heads, K and V widths of a head's keys and values, W window.
"""

from functools import partial
from typing import Any

from torch import nn

from datamodules.errors import SIZE, UserError, check_numbers
from lightning_modules.core.decoder import Decoder, Factory
from lightning_modules.core.sequence_model import SequenceModel, check_sizes
from lightning_modules.groundthink.gated_delta import GatedDelta
from lightning_modules.groundthink.gates import InitialGates
from lightning_modules.groundthink.keys import Keys
from lightning_modules.groundthink.recall import Recall
from lightning_modules.groundthink.swiglu import SwiGLU
from lightning_modules.groundthink.window_attention import WindowAttention

WIDEST = 256  # of keys and values, in the kernel
ALIGNMENT = 4  # of both, in the kernel
MOST_CONVOLVED = 64  # positions of a convolution, which is meant to be short


class GroundThink(SequenceModel):
    """A decoder whose blocks mix positions by the gated delta rule (G) or by window attention (S), each with a SwiGLU.

    There is no position embedding, so rows may be longer than `seq_len`, and generation takes constant memory.

    Args:
        vocab_size: Tokens of the data.
        seq_len: Longest sequence of the data.
        width: D, the width of the residual stream.
        heads: H, the heads of each block, a divisor of the width.
        pattern: One letter per block, G or S, such as GS, SG or GSGS.
        key_width: K of the gated delta rule; D / H if None.
        value_width: V of the gated delta rule; D / H if None.
        window: W, the positions that window attention sees, its own position included.
        mlp_width: Hidden units of each SwiGLU; 0 for blocks without one; 8 D / 3, up to a multiple of 8, if None.
        conv_width: Positions that the short convolutions of queries, keys and values read; 0 for no convolution.
        key_conv_width: The same for keys alone; `conv_width` if None.
        gates: The initial gates of the delta rule; `seed` takes those of the notes.
        allow_negative_eigenvalues: Writing strengths up to 2 instead of 1.
        shifted_value: Write each value under the key of the position before.
        keys: Whether keys come from the token, from a pseudorandom vector of the position, or from both.
        window_reads_state: Window attention also reads the recurrent state of the last G before it.
        **common: The arguments of `SequenceModel`.

    Raises:
        UserError: A size does not fit, or the pattern has another letter; at `setup`, a checkpoint or the data does not
            fit.
    """

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        width: int = 64,
        heads: int = 2,
        pattern: str = "GS",
        key_width: int | None = None,
        value_width: int | None = None,
        window: int = 64,
        mlp_width: int | None = None,
        conv_width: int = 4,
        key_conv_width: int | None = None,
        gates: InitialGates = "spread",
        allow_negative_eigenvalues: bool = False,
        shifted_value: bool = False,
        keys: Keys = "token",
        window_reads_state: bool = False,
        **common: Any,
    ):
        check_sizes(width=width, heads=heads, window=window)
        check_numbers("model", 0, SIZE, mlp_width=mlp_width)
        check_numbers("model", 0, MOST_CONVOLVED, conv_width=conv_width, key_conv_width=key_conv_width)
        _check_pattern(pattern, window_reads_state)
        if width % heads:
            raise UserError(f"model.heads must divide model.width: {heads} does not divide {width}")
        if "S" in pattern and width // heads % 2:
            raise UserError(f"model.width / model.heads must be even for rotary positions, not {width // heads}")
        head_width = width // heads
        self.width, self.heads, self.pattern, self.window = width, heads, pattern, window
        self.sizes = {"key_width": key_width or head_width, "value_width": value_width or head_width}
        _check_kernel(**self.sizes)
        self.mlp_width = -(-width // 3) * 8 if mlp_width is None else mlp_width
        self.window_reads_state = window_reads_state
        self.delta_options: dict[str, Any] = {
            "conv_width": conv_width,
            "key_conv_width": conv_width if key_conv_width is None else key_conv_width,
            "gates": gates,
            "allow_negative_eigenvalues": allow_negative_eigenvalues,
            "shifted_value": shifted_value,
            "keys": keys,
        }
        super().__init__(vocab_size, seq_len, **common)

    def make_network(self) -> Decoder:
        """Return a decoder with RMSNorm, SwiGLU and the mixers of the pattern, without positions."""
        mixers: list[Factory] = []
        recall: Recall | None = None
        for letter in self.pattern:
            if letter == "G":
                recall = Recall(**self.sizes) if self.window_reads_state else None
                options = self.sizes | self.delta_options
                mixers.append(partial(GatedDelta, self.width, self.heads, recall=recall, **options))
            else:
                mixers.append(partial(WindowAttention, self.width, self.heads, self.window, recall))
        mlp = partial(SwiGLU, self.width, self.mlp_width) if self.mlp_width else None
        return Decoder(self.vocab_size, self.width, mixers, mlp, partial(nn.RMSNorm, eps=1e-6))


def _check_pattern(pattern: str, window_reads_state: bool) -> None:
    if not pattern or (unknown := sorted(set(pattern) - set("GS"))):
        wrong = f"'{unknown[0]}' is neither" if pattern else "it is empty"
        raise UserError(
            f"model.pattern must have one letter per block, G (gated delta) or S (window attention): {wrong}"
        )
    if window_reads_state and "GS" not in pattern:
        raise UserError(f"model.window_reads_state needs an S behind a G in model.pattern, which is {pattern}")


def _check_kernel(**sizes: int) -> None:
    check_numbers("model", ALIGNMENT, WIDEST, **sizes)
    for name, size in sizes.items():
        if size % ALIGNMENT:
            nearest = max(ALIGNMENT, round(size / ALIGNMENT) * ALIGNMENT)
            raise UserError(f"model.{name} must be a multiple of {ALIGNMENT}, such as {nearest}, not {size}")
