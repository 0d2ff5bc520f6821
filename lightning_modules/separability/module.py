"""The separability line: what a shared residual stream carries, and how it responds to interventions.

Shapes: S ensemble members, B batch, T positions, V vocabulary, D width.
"""

from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from datamodules.batch import TokenBatch
from lightning_modules.core.block import MLP
from lightning_modules.core.decoder import Decoder
from lightning_modules.core.sequence_model import Penalties, SequenceModel
from lightning_modules.core.sizes import check_heads, check_sizes
from lightning_modules.core.token_weight import weigh_labels
from lightning_modules.separability.anchor import Orthogonality
from lightning_modules.separability.attention import Attention
from lightning_modules.separability.measures import Separation, position_overlap


class Separability(SequenceModel):
    """A decoder-only transformer that predicts the next token and is measured at its last residual stream.

    Measures are those of `Separation`, under `validation/` and `test/`; a test adds `position_overlap`.

    Args:
        vocab_size: Tokens of the data.
        seq_len: Longest sequence of the data.
        width: Width of the residual stream.
        depth: Blocks.
        heads: Heads of each block, a divisor of the width.
        mlp_width: Hidden units of each MLP; four times the width if None.
        norm: `layer` for LayerNorm before each part and at the end; `none` for no norm at all, as in the first
            mechanistic studies of grokking.
        orthogonality: An anchor model whose residual stream is to be avoided.
        **common: The arguments of `SequenceModel`.

    Raises:
        UserError: A size does not fit; at `setup`, a checkpoint or the data does not.
    """

    network_options = {"with_residual": True}  # noqa: RUF012
    measures: Separation

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        width: int = 128,
        depth: int = 1,
        heads: int = 4,
        mlp_width: int | None = None,
        norm: Literal["layer", "none"] = "layer",
        orthogonality: Orthogonality | None = None,
        **common: Any,
    ):
        check_sizes(width=width, depth=depth, heads=heads, mlp_width=mlp_width)
        check_heads(width, heads)
        self.width, self.depth, self.heads = width, depth, heads
        self.mlp_width, self.norm = mlp_width or 4 * width, norm
        super().__init__(vocab_size, seq_len, **common)
        self.orthogonality = orthogonality

    def make_network(self) -> Decoder:
        """Return a decoder with learned positions and attention in every block."""
        mixers = [partial(Attention, self.width, self.heads)] * self.depth
        mlp, norm = partial(MLP, self.width, self.mlp_width), nn.LayerNorm if self.norm == "layer" else nn.Identity
        return Decoder(self.vocab_size, self.width, mixers, mlp, norm, positions=self.seq_len)

    def make_measures(self) -> Separation:
        """Return performance, amplitude and variance at the last residual stream."""
        return Separation(self.ensemble, self.vocab_size, self.width)

    def setup(self, stage: str) -> None:
        """Check the data, and load the weights of `start` and of the anchor."""
        super().setup(stage)
        if self.orthogonality:
            self.orthogonality.load(self.network, self.ensemble)

    def compile_losses(self) -> None:
        """Compile the step, and the anchor's forward."""
        super().compile_losses()
        if self.orthogonality:
            self.orthogonality.train_residual = torch.compile(self.orthogonality.residual)

    def penalties(self, outputs: tuple[Tensor, ...], batch: TokenBatch) -> Penalties:
        """Return the orthogonality penalty, if there is an anchor."""
        if self.orthogonality is None:
            return {}
        penalty_S = self.orthogonality.penalty(outputs[1], batch["tokens"], batch["labels"])
        # A mean over the labelled positions of this rank, of which ranks may have other numbers
        return {"orthogonality": (self.orthogonality.weight, weigh_labels(self, penalty_S, batch["labels"]))}

    def update_measures(self, outputs: tuple[Tensor, ...], batch: TokenBatch) -> None:
        """Add a held-out batch to the measures."""
        logits_SBTV, x_SBTD = outputs
        cosine_SBT = None
        if self.orthogonality:
            cosine_SBT = self.orthogonality.cosine(x_SBTD, self.orthogonality.residual(batch["tokens"]))
        unembed_SVD = self._weight("unembed").view(self.ensemble, self.vocab_size, self.width)
        self.measures.update(logits_SBTV, x_SBTD, batch["labels"], unembed_SVD, cosine_SBT)

    def test_measures(self) -> dict[str, Tensor]:
        """Return the overlap of the position embeddings."""
        return {
            "position_overlap": position_overlap(self._weight("position_embedding").view(self.ensemble, -1, self.width))
        }

    def _weight(self, name: str) -> Tensor:
        return cast(Tensor, self.network.get_submodule(name).weight)
