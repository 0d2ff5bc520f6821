"""What objectives read of a training step, and what an objective is.

Shapes: B batch, K soft tokens, Q tokens, D target width, F features, N answer tokens of the whole batch, V vocabulary.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from lightning_modules.telepathy.averages import masked_mean
from lightning_modules.telepathy.batch import TrainingBatch
from lightning_modules.telepathy.bottleneck import Bottleneck
from lightning_modules.telepathy.bridges import Bridge
from lightning_modules.telepathy.encoding import Encoding
from lightning_modules.telepathy.flaws import Flaw
from lightning_modules.telepathy.target import Target

Need = Literal["question", "aligned", "answer", "text", "autoencode", "readback"]
RowsOf = Literal["soft", "autoencode", "readback"]


@dataclass
class BridgeStep:
    """One training step, as objectives read it.

    Attributes:
        batch: The batch of this rank.
        target: The frozen target.
        bridge: The bridge.
        bottleneck: The bottleneck behind it.
        encoding: The soft tokens and what they came from.
        logits_NV: The target's logits at the answer tokens, from the soft tokens.
        scale: Root mean square of the target's embeddings.
        gather: Returns the rows of all ranks, with gradients.
        heads: The trained heads of objectives that have one, by name.
        flaws: The flaws of the notes to reproduce.
    """

    batch: TrainingBatch
    target: Target
    bridge: Bridge
    bottleneck: Bottleneck
    encoding: Encoding
    logits_NV: Tensor
    scale: float
    gather: Callable[[Tensor], Tensor]
    heads: nn.ModuleDict
    flaws: Collection[Flaw] = ()

    @property
    def soft_BKD(self) -> Tensor:
        """The soft tokens."""
        return self.encoding.soft_BKD

    @property
    def features_BF(self) -> Tensor:
        """All soft tokens of an input in one row, or their mean if the number varies, so that ranks agree on F."""
        fixed = self.bridge.soft_tokens is not None
        return self.soft_BKD.flatten(1) if fixed else masked_mean(self.soft_BKD, self.batch["soft_mask"])

    def embedded(self, text: Literal["question", "aligned", "answer"]) -> tuple[Tensor, Tensor]:
        """Return the target's vectors of the question, in order or at soft tokens, or of the answer; and their mask."""
        batch = self.batch
        if text == "aligned":
            return self.target.vectors(batch["aligned"]).float(), batch["aligned_mask"]
        if text == "question":
            return self.target.vectors(batch["question"]).float(), batch["question_mask"]
        return self.target.vectors(batch["answer"]).float(), batch["answer_mask"]

    def answered(self, rows: RowsOf) -> Tensor:
        """Return the target's logits_NV at the answer tokens of these rows, from the soft tokens."""
        return self.logits_NV if rows == "soft" else self.target.logits(self.batch[rows], self.soft_BKD)


@dataclass(frozen=True)
class Sizes:
    """What the heads of objectives are made for.

    Attributes:
        source: Width C of the source's states.
        target: Width D of the soft tokens.
        vocabulary: Number of the target's embeddings.
        flaws: The flaws of the notes to reproduce.
    """

    source: int
    target: int
    vocabulary: int
    flaws: Collection[Flaw] = ()


@dataclass(frozen=True)
class Objective:
    """How one objective reads a training step.

    Attributes:
        loss: The unweighted loss.
        mass: Of a mean over this rank's answer tokens, the sum of their weights, so that the mean over ranks becomes
            one over all tokens. None for means over rows, of which all ranks have the same number.
        needs: What the batch must hold beside the rows with soft tokens.
        head: Makes the objective's own trained part, if it has one.
        weight: What the loss is multiplied with.
    """

    loss: Callable[[BridgeStep], Tensor]
    mass: Callable[[BridgeStep], Tensor | int] | None = None
    needs: tuple[Need, ...] = ()
    head: Callable[[Sizes], nn.Module] | None = None
    weight: float = 1.0
