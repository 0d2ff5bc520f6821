"""The phase line: a language model whose memory is written and read by phase.

Shapes: S ensemble members, B batch, T positions, V vocabulary, D width, H heads, K frequencies of a head, W window.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.batch import TokenBatch
from datamodules.errors import SIZE, UserError, check_numbers
from datamodules.sequence_task import SequenceTask
from lightning_modules.core.block import Factory
from lightning_modules.core.contracts import HasVocabulary
from lightning_modules.core.decoder import Decoder
from lightning_modules.core.sequence_model import SequenceModel
from lightning_modules.core.sizes import check_convolutions, check_sizes, warn_of_unused
from lightning_modules.mixers.gated_delta import GatedDelta
from lightning_modules.mixers.swiglu import SwiGLU
from lightning_modules.mixers.window_attention import WindowAttention
from lightning_modules.phase.angles import Kind
from lightning_modules.phase.lstm import LSTM
from lightning_modules.phase.mixer import Normalise, PhaseMixer
from lightning_modules.phase.pattern import check_pattern
from lightning_modules.phase.sampling import mixed_tokens
from lightning_modules.phase.weights import DecayKind

OUTPUTS = "out_proj.weight", "o_proj.weight", "down.weight"  # of mixers and SwiGLU


class Phase(SequenceModel):
    """A decoder whose blocks mix positions by phase (P), and models to compare it with: the same with other letters.

    G is the gated delta rule, A attention with rotary positions, L an LSTM. `PPPG` is a hybrid with an associative
    memory; `AAAA` is a transformer. The output maps of mixers and SwiGLU begin as zero. There is no position embedding,
    so rows may be longer than `seq_len`. Generation takes constant memory; an attention window bounds that of A.

    Args:
        vocab_size: Tokens of the data.
        seq_len: Longest sequence of the data.
        width: D, the width of the residual stream.
        heads: H, the heads of G and A, and of P with `frequencies`; a divisor of the width.
        pattern: One letter per block: P, G, A or L.
        angles: How the phase of the reader differs from that of the writer: `single` (not at all), `query_offset`,
            `offsets` (of both), `constrained` or `decoupled`.
        decay: Whether the memory of P fades: `none`, `learned` (a rate per channel) or `input` (depends on the input).
        window: W, the positions that P reads; None for all.
        frequencies: K, frequencies per head of an outer-product memory; None for one complex number per channel.
        mass: Weight what P writes.
        normalise: What the output of P is divided by: `rms`, `mass` (the sum of all weights) or `none`.
        conv_width: Positions that the short convolutions of P and G read; 0 for no convolution.
        expansion: Hidden width of the output of P over D, with GELU; 0 for a single linear map.
        dropout: Share of inputs of the output map of P that are zeroed in training.
        residual_dropout: Share of the outputs of every mixer and SwiGLU that are zeroed in training.
        attention_window: Positions that A reads; `seq_len` if None.
        mlp_width: Hidden units of the SwiGLU (feed-forward network) of each block; 0 for blocks without one.
        scheduled_sampling: Share of the model's own samples in the input at `trainer.max_steps`; linear from 0.
        **common: The arguments of `SequenceModel`.

    Raises:
        UserError: A size does not fit, or the pattern has another letter; at `setup`, a checkpoint or the data does not
            fit, or `scheduled_sampling` has no `trainer.max_steps`.
    """

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        width: int = 128,
        heads: int = 4,
        pattern: str = "PPPP",
        angles: Kind = "single",
        decay: DecayKind = "learned",
        window: int | None = None,
        frequencies: int | None = None,
        mass: bool = False,
        normalise: Normalise = "rms",
        conv_width: int = 4,
        expansion: int = 0,
        dropout: float = 0.0,
        residual_dropout: float = 0.0,
        attention_window: int | None = None,
        mlp_width: int = 0,
        scheduled_sampling: float = 0.0,
        **common: Any,
    ):
        check_sizes(width=width, heads=heads, window=window, frequencies=frequencies, attention_window=attention_window)
        check_numbers("model", 0, SIZE, mlp_width=mlp_width, expansion=expansion)
        check_convolutions(conv_width=conv_width)
        shares = {"dropout": dropout, "residual_dropout": residual_dropout, "scheduled_sampling": scheduled_sampling}
        check_numbers("model", 0, 1, **shares)
        if frequencies and normalise == "mass":
            raise UserError("model.normalise mass belongs to a memory per channel: set rms with model.frequencies")
        check_pattern(pattern, width, heads)
        self.width, self.heads, self.pattern, self.mlp_width = width, heads, pattern, mlp_width
        self.conv_width, self.attention_window = conv_width, attention_window or seq_len
        self.scheduled_sampling, self.residual_dropout = scheduled_sampling, residual_dropout
        self.options: dict[str, Any] = {"frequencies": frequencies, "angles": angles, "decay": decay, "window": window}
        self.options |= {"mass": mass, "normalise": normalise, "expansion": expansion, "dropout": dropout}
        warn_of_unused(pattern, Phase, P=self.options, A={"attention_window": attention_window})
        super().__init__(vocab_size, seq_len, **common)

    def make_network(self) -> Decoder:
        """Return a decoder with RMSNorm and the mixers of the pattern, without positions."""
        size, conv = self.width // self.heads, self.conv_width
        factories: dict[str, Factory] = {
            "P": partial(PhaseMixer, self.width, self.heads, conv_width=conv, **self.options),
            "G": partial(GatedDelta, self.width, self.heads, size, size, conv, conv),
            "A": partial(WindowAttention, self.width, self.heads, self.attention_window),
            "L": partial(LSTM, self.width),
        }
        mlp = partial(SwiGLU, self.width, self.mlp_width) if self.mlp_width else None
        mixers, norm = [factories[letter] for letter in self.pattern], partial(nn.RMSNorm, eps=1e-6)
        network = Decoder(self.vocab_size, self.width, mixers, mlp, norm, dropout=self.residual_dropout)
        for output in (weight for name, weight in network.named_parameters() if name.endswith(OUTPUTS)):
            nn.init.zeros_(output)  # a block begins as the identity, which shortens the start of training
        return network

    def setup(self, stage: str) -> None:
        """Check that scheduled sampling knows the end of training, and what every sequence model checks."""
        super().setup(stage)
        if stage != "fit" or not self.scheduled_sampling:
            return
        if self.trainer.max_steps < 1:
            raise UserError("trainer.max_steps must be set: model.scheduled_sampling rises up to that step")
        if isinstance(data := self._data, SequenceTask) and not data.predicts_next:
            kind = type(data).__name__
            raise UserError(
                f"model.scheduled_sampling needs labels that are the next tokens; `predicts_next` of {kind} is false"
            )

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Return the loss; with `scheduled_sampling`, the model reads some of its own predictions."""
        if self.scheduled_sampling:
            share = self.scheduled_sampling * min(1.0, self.global_step / self.trainer.max_steps)
            with torch.no_grad():
                logits_SBTV = self.call(batch["tokens"], batch["labels"])[0]
            if isinstance(data := self._data, HasVocabulary):
                logits_SBTV = logits_SBTV[..., : data.vocab_size]  # a model may have more tokens than its data
            step = self.seeds, self.global_step, batch_idx, self.global_rank
            batch = batch | {"tokens": mixed_tokens(batch["tokens"], batch["labels"], logits_SBTV, share, *step)}
        return super().training_step(batch, batch_idx)
