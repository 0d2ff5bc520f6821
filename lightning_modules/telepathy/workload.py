"""The size of a training step."""

from collections.abc import Sequence

from lightning_modules.core.contracts import Workload
from lightning_modules.telepathy.batch import TrainingBatch


def workload(batch: TrainingBatch, sizes: Sequence[int]) -> Workload:
    """Return samples, target positions, their padding, and flops of a training step.

    Per parameter and position there are 2 flops forward, 2 for gradients of activations (not in the source), and 2 for
    gradients of weights (in the bridge alone).

    Args:
        batch: The batch of this rank.
        sizes: The numbers of parameters of source, target and bridge.
    """
    tokens = batch["soft"].tokens_BT.numel()
    read, answered, bridged = 2 * batch["source"].numel(), 4 * tokens, 6 * batch["soft_mask"].numel()
    if "text" in batch:
        answered += 2 * batch["text"].tokens_BT.numel()
    if "prefixed" in batch:
        answered += 4 * batch["prefixed"].tokens_BT.numel()
    flops = read * sizes[0] + answered * sizes[1] + bridged * sizes[2]
    return Workload(len(batch["source"]), tokens, flops, batch["soft"].padding)
