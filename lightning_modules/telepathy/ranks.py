"""What the ranks of a run tell one another.

Shapes: B batch, F features.
"""

from typing import cast

from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from datamodules.errors import UserError
from lightning_modules.pretrained.sharding import is_sharded, shard


def all_rows(module: LightningModule, x_BF: Tensor) -> Tensor:
    """Return the rows of all ranks, with gradients."""
    if module.trainer.world_size == 1:
        return x_BF
    return cast(Tensor, module.all_gather(x_BF, sync_grads=True)).flatten(0, 1)


def shard_over(trainer: Trainer, *models: nn.Module) -> None:
    """Split models over the processes of a fit; those without weights stay as they are.

    Raises:
        UserError: The strategy of several processes is not DDP.
    """
    if trainer.world_size == 1:
        rank_zero_warn("model.shard_frozen: there is one process, so nothing is split")
        return
    if not isinstance(trainer.strategy, DDPStrategy):
        raise UserError("model.shard_frozen needs trainer.strategy ddp, which it completes")
    for model in models:
        if any(True for _ in model.parameters()) and not is_sharded(model):
            shard(model, trainer.strategy.root_device.type, trainer.world_size)


def summed(module: LightningModule, x: Tensor) -> Tensor:
    """Return the sum of a tensor over the ranks."""
    gathered = cast(Tensor, module.all_gather(x))  # with a first axis of ranks, if there are several
    return gathered.reshape(-1, *x.shape).sum(0)
