"""The groundthink line: needles in the delta-rule state of a hybrid of a linear recurrence and window attention.

Shapes: B batch, T positions, D width, H heads, K and V widths of a head's keys and values, W window.
"""

from typing import Any, Literal

from torch import Tensor

from datamodules.errors import SIZE, UserError, check_numbers
from lightning_modules.core.decoder import DecoderState
from lightning_modules.core.sizes import check_convolutions, check_sizes, warn_of_unused
from lightning_modules.groundthink import checks
from lightning_modules.groundthink.hybrid import Hybrid, make_hybrid
from lightning_modules.groundthink.penalties import KeyPenalty, Penalty
from lightning_modules.groundthink.training import PenalisedModel
from lightning_modules.mixers.gates import InitialGates
from lightning_modules.mixers.key_bank import KeyBank
from lightning_modules.mixers.keys import Keys

Flaw = Literal["final_state"]


class GroundThink(PenalisedModel):
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
        tie_embeddings: Give the unembedding the weights of the token embedding: V D parameters less, and a token that
            is only carried to another position is predicted there, whether or not training has shown it before.
        mlp_width: Hidden units of each SwiGLU; 0 for blocks without one; 8 D / 3, up to a multiple of 8, if None.
        conv_width: Positions that the short convolutions of queries, keys and values read; 0 for no convolution.
        key_conv_width: The same for keys alone; `conv_width` if None.
        gates: The initial gates of the delta rule; `seed` takes those of the notes.
        allow_negative_eigenvalues: Writing strengths up to 2 instead of 1.
        shifted_value: Write each value under the key of the position before.
        keys: Whether keys come from the token, from a pseudorandom vector of the position, or from both.
        rotary_keys: Rotary positions in the queries and keys of tokens, as the notes tried them.
        key_bank: Markers: tokens whose keys come from a bank of K orthogonal keys; see `Bank`.
        window_reads_state: Window attention also reads the recurrent state of the last G before it.
        key_orthogonality: Penalty on keys of one row that overlap, logged as `train/key_orthogonality`.
        beta_sparsity: Penalty on the mean writing strength, logged as `train/beta_sparsity`.
        piece_len: Positions that validation, test and predict read at once. The state is carried from piece to piece,
            so logits are those of whole rows, which None reads, and which a callback with a hook on the network gets.
        reproduce_flaws: Reproduce the flaws of the notes, all or a list. `final_state`: with `window_reads_state`, each
            position reads the state after the last position, and so sees the answers that it has to predict.
        **common: The arguments of `SequenceModel`.

    Raises:
        UserError: A size does not fit, the pattern has another letter, or an option would change nothing; at `setup`, a
            checkpoint or the data does not fit.
    """

    network: Hybrid

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
        tie_embeddings: bool = False,
        mlp_width: int | None = None,
        conv_width: int = 4,
        key_conv_width: int | None = None,
        gates: InitialGates = "spread",
        allow_negative_eigenvalues: bool = False,
        shifted_value: bool = False,
        keys: Keys = "token",
        rotary_keys: bool = False,
        key_bank: KeyBank | None = None,
        window_reads_state: bool = False,
        key_orthogonality: KeyPenalty | None = None,
        beta_sparsity: Penalty | None = None,
        piece_len: int | None = None,
        reproduce_flaws: bool | list[Flaw] = False,
        **common: Any,
    ):
        check_sizes(vocab_size=vocab_size, width=width, heads=heads, window=window, piece_len=piece_len)
        check_numbers("model", 0, SIZE, mlp_width=mlp_width)
        check_convolutions(conv_width=conv_width, key_conv_width=key_conv_width)
        checks.check_pattern(pattern, window_reads_state)
        checks.check_head_widths(width, heads, pattern)
        penalties = {"key_orthogonality": key_orthogonality, "beta_sparsity": beta_sparsity}
        of_tokens: dict[str, object] = {"rotary_keys": rotary_keys, "key_conv_width": key_conv_width}
        of_tokens["key_orthogonality"] = key_orthogonality
        widths = {"key_width": key_width, "value_width": value_width}
        others: dict[str, object] = {"key_bank": key_bank, "beta_sparsity": beta_sparsity, "gates": gates != "spread"}
        others |= {"shifted_value": shifted_value, "allow_negative_eigenvalues": allow_negative_eigenvalues}
        checks.check_delta_options(pattern, keys, of_tokens, **others, **widths)
        checks.check_final_state(bool(reproduce_flaws), window_reads_state, piece_len)
        sizes = {name: width // heads if size is None else size for name, size in widths.items()}
        checks.check_kernel(pattern, **sizes)
        warn_of_unused(pattern, GroundThink, S={"window": window}, G={"conv_width": conv_width})
        if key_bank:
            key_bank.check(vocab_size)
        self.width, self.heads, self.pattern, self.window = width, heads, pattern, window
        self.parts: dict[str, Any] = {
            "window": window,
            "mlp_width": -(-width // 3) * 8 if mlp_width is None else mlp_width,
            "keys": keys,
            "rotary_keys": rotary_keys,
            "key_bank": key_bank,
            "recall": "none" if not window_reads_state else "final" if reproduce_flaws else "causal",
            "overlap": key_orthogonality.form if key_orthogonality else "squared",
            "piece_len": piece_len,
            "tied": tie_embeddings,
            "delta_options": {
                **sizes,
                "conv_width": conv_width,
                "key_conv_width": conv_width if key_conv_width is None else key_conv_width,
                "gates": gates,
                "allow_negative_eigenvalues": allow_negative_eigenvalues,
                "shifted_value": shifted_value,
            },
        }
        super().__init__(vocab_size, seq_len, penalties, **common)

    def make_network(self) -> Hybrid:
        """Return a decoder with RMSNorm, SwiGLU and the mixers of the pattern, without positions."""
        return make_hybrid(self.vocab_size, self.width, self.heads, self.pattern, **self.parts)

    def read(self, tokens_BT: Tensor, state: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
        """Return logits_BTV of a piece of each row and the state after it; the next call takes that state.

        Pieces give the logits of the whole rows, and gradients flow from piece to piece through the state. Training
        carries no state from batch to batch, since the rows of two batches do not continue each other.

        Raises:
            UserError: The model is an ensemble or reads the state after the last position, or the piece is empty.
        """
        if self.ensemble > 1:
            raise UserError("an ensemble cannot carry a state between calls: use a model with model.ensemble 1")
        if not tokens_BT.shape[1]:
            raise UserError("a piece has no tokens: read at least one token of each row")
        return self.network.extend(tokens_BT, state or self.network.init_state(len(tokens_BT)))
