"""How the hybrid is trained: a loss that never holds all logits, and penalties on its writes.

Shapes: S ensemble members, B batch, T positions, V vocabulary, D width.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.batch import IGNORE, TokenBatch
from datamodules.errors import UserError
from lightning_modules.core.losses import linear_member_losses, member_losses
from lightning_modules.core.sequence_model import Penalties, SequenceModel
from lightning_modules.groundthink.hybrid import Hybrid
from lightning_modules.groundthink.penalties import Onsets, Penalty

BEGUN = "penalties_begun"  # in checkpoints

# Lightning says whose hook it calls where only one of module and data has it
warnings.filterwarnings("ignore", "You have overridden `on_before_batch_transfer` in `LightningModule`")


class PenalisedModel(SequenceModel):
    """A sequence model over a `Hybrid`, with the penalties `key_orthogonality` and `beta_sparsity`.

    Args:
        vocab_size: Tokens of the data.
        seq_len: Longest sequence of the data.
        penalties: The penalties by name, None where one is not set.
        **common: The arguments of `SequenceModel`.
    """

    network: Hybrid

    def __init__(self, vocab_size: int, seq_len: int, penalties: Mapping[str, Penalty | None], **common: Any):
        super().__init__(vocab_size, seq_len, **common)
        self.onsets = Onsets(penalties, self.ensemble)
        self._most_labelled: int | None = None  # of the batch of the step

    def setup(self, stage: str) -> None:
        """Check what `SequenceModel` checks, and that penalties can begin.

        Raises:
            UserError: A penalty waits for an accuracy, and there are no validations.
        """
        super().setup(stage)
        waits = [name for name, penalty in self.onsets.penalties.items() if penalty.from_accuracy is not None]
        if stage == "fit" and waits and not self.trainer.limit_val_batches:
            raise UserError(
                f"model.{waits[0]}.from_accuracy: trainer.limit_val_batches is 0, and it waits for a validation"
            )
        for name, penalty in self.onsets.penalties.items():
            if stage == "fit" and 0 <= self.trainer.max_steps <= penalty.from_step:
                rank_zero_warn(
                    f"model.{name}.from_step is {penalty.from_step}, so the penalty never begins: "
                    f"training ends at step {self.trainer.max_steps}"
                )

    def losses(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the cross-entropy of each member, and the predicted tokens_SBT, with overlap_S and mean beta_S.

        With a hook on the unembedding all logits are made, and stand for the predicted tokens.
        """
        unembed, options = self.network.unembed, {"with_writes": bool(self.onsets.penalties)}
        if unembed._forward_hooks:
            outputs = self.call(tokens, labels, **options)
            return member_losses(outputs[0], labels, self.double_loss), outputs
        x_SBTD, *writes = self.call(tokens, labels, with_logits=False, **options)
        weight_SVD = unembed.weight.view(self.ensemble, *unembed.weight.shape[-2:])
        loss_S, predicted_SBT = linear_member_losses(x_SBTD, weight_SVD, labels, self._most_labelled, self.double_loss)
        return loss_S, (predicted_SBT, *writes)

    def step_variant(self) -> int | None:
        """Return the number of positions for which logits are made."""
        return self._most_labelled

    def penalties(self, outputs: tuple[Tensor, ...], batch: TokenBatch) -> Penalties:
        """Return the penalties that are set."""
        if not self.onsets.penalties:
            return {}
        overlap_S, beta_S = outputs[1:]
        return self.onsets.weigh({"key_orthogonality": overlap_S, "beta_sparsity": beta_S}, self.global_step)

    def on_before_batch_transfer(self, batch: TokenBatch, dataloader_idx: int) -> TokenBatch:
        """Count the labels of a training batch while they are on the host."""
        if self.trainer.training and batch["labels"].device.type == "cpu":
            labelled = (batch["labels"] != IGNORE).flatten(-2).sum(-1).max().item()
            # A power of two, since compiled code has one version for each number
            self._most_labelled = 1 << max(0, int(labelled) - 1).bit_length()
        return batch

    def on_train_batch_end(self, *_: object) -> None:
        """Forget the count, which is that of one batch."""
        self._most_labelled = None

    def on_validation_epoch_end(self) -> None:
        """Log the measures, and begin the penalties that waited for this accuracy."""
        super().on_validation_epoch_end()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.onsets.advance(self.members["validation/accuracy"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add which penalties have begun."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[BEGUN] = self.onsets.begun()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore which penalties have begun."""
        super().on_load_checkpoint(checkpoint)
        self.onsets.restore(checkpoint.get(BEGUN, {}))
