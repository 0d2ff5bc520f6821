"""Bits per character by the position in the row, in rows that are longer than those of training.

Shapes: S ensemble members, B rows, T positions, V vocabulary.
"""

import math

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy

from callbacks.probe import Probe, naming
from datamodules.errors import check_numbers
from datamodules.sequence_task import Split
from lightning_modules.core.ensemble_module import EnsembleModule
from lightning_modules.core.reporting import report_members

AT_ONCE = 8  # rows, which are long


def bits_by_position(module: EnsembleModule, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy over rows at each position, in bits, [S, T]."""
    total_ST = torch.zeros(module.ensemble, tokens_BT.shape[1], dtype=torch.float64, device=module.device)
    for rows_BT, targets_BT in zip(*(torch.split(x_BT, AT_ONCE) for x_BT in (tokens_BT, labels_BT)), strict=True):
        logits_SBTV = module.call(rows_BT.to(module.device))[0].float()
        target_SBT = targets_BT.to(module.device).expand(logits_SBTV.shape[:3])
        loss_SBT = cross_entropy(logits_SBTV.flatten(0, 2), target_SBT.flatten(), reduction="none")
        total_ST += loss_SBT.view(target_SBT.shape).sum(1)
    return total_ST / len(tokens_BT) / math.log(2)


class BitsByPosition(Probe):
    """Measures the bits per character along rows of several times the training length.

    It runs at the end of `validate` and `test`, and at some validations of a fit. With `<stage>` `validation` or `test`
    and L the length of the data's rows:

    - `<stage>/bits_at_0_5`, `_1`, `_1_5`, ...: mean over the positions of the half row that ends there, in units of L.
      They depend on the text there, too.
    - `<stage>/bits_growth`: what a long row costs, whatever its text: the mean over the last half row less that of the
      same characters in the second half of rows that begin only L positions before their end. It is 0 for a model that
      reads at most L / 2 positions, positive if long rows harm more than what lies further back helps, and negative if
      it is the other way round.

    Tokens of bytes and characters count as one character each; tokens of `bpe` as many as they have on average. Every
    rank measures all rows.

    Example::

        trainer:
          callbacks+:
            - {class_path: BitsByPosition, init_args: {every_n_steps: 500}}

    Args:
        rows: Rows of the held-out text; fewer if it is short.
        every_n_steps: In a fit, measure at the first validation after each n optimizer steps; 0 for never.
        times: Length of the rows over L.

    Raises:
        UserError: A number is too small; at `setup`, there are two of these callbacks, the data is no text, or the
            held-out text or the model's position embedding is too short.
    """

    def __init__(self, rows: int = 32, every_n_steps: int = 500, times: int = 4) -> None:
        super().__init__(rows, every_n_steps)
        check_numbers("BitsByPosition", 1, times=times)
        self.times = times

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse data of another kind, short texts, and models that cannot read long rows."""
        super().setup(trainer, pl_module, stage)
        texts = self.text(trainer)
        length = self.times * texts.seq_len
        self.check_length(pl_module, length)
        with naming(self):
            texts.text_rows("test" if stage == "test" else "validation", 1, length)

    def measure(self, trainer: Trainer, module: EnsembleModule, split: Split) -> None:
        """Measure and report."""
        texts = self.text(trainer)
        length = texts.seq_len
        batch = texts.text_rows(split, self.count(trainer), self.times * length)
        tokens_BT, labels_BT = batch["tokens"], batch["labels"]
        rate = texts.tokens_per_character(split)
        bits_ST = bits_by_position(module, tokens_BT, labels_BT) * rate
        short_ST = bits_by_position(module, tokens_BT[:, -length:], labels_BT[:, -length:]) * rate
        half = max(length // 2, 1)
        measures = {}
        for number in range(1, 2 * self.times + 1):
            start, end = (number - 1) * length // 2, number * length // 2
            if start < end:  # a row of one token has no first half
                measures[f"{split}/bits_at_{number / 2:g}".replace(".", "_")] = bits_ST[:, start:end].mean(1)
        growth_S = bits_ST[:, -half:].mean(1) - short_ST[:, -half:].mean(1)
        report_members(trainer, module, measures | {f"{split}/bits_growth": growth_S})
