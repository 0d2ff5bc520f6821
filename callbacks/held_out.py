"""Evaluation of a module in the middle of training: held-out batches, eval mode, and no trace in the training."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from datamodules.errors import UserError
from lightning_modules.core.contracts import connected


def validation_loader(trainer: Trainer, pl_module: LightningModule, user: str) -> Iterable[object]:
    """Return the first validation loader of the datamodule, of the module, or of the trainer.

    Args:
        trainer: The trainer.
        pl_module: The module.
        user: Name of the callback that needs the loader, for the message.

    Raises:
        UserError: There is no validation data.
    """
    owner = connected(trainer).datamodule or pl_module
    loaders = owner.val_dataloader() if is_overridden("val_dataloader", owner) else trainer.val_dataloaders
    flat: list[Iterable[object]] = [] if loaders is None else CombinedLoader(loaders, "sequential").flattened
    if not flat:
        raise UserError(f"{user} found no held-out data: data has no validation loader.")
    return flat[0]


@contextmanager
def evaluation(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Run the block in eval mode, without gradients, in the Trainer's precision; the random states come back after it.

    Fetch batches inside too, because making the iterator of a loader draws random numbers.
    """
    with isolate_rng(), eval_mode(pl_module), torch.no_grad(), trainer.precision_plugin.val_step_context():
        yield


@contextmanager
def validated_weights(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Run the block with the weights that the validation has measured, and then restore those of training.

    They differ where a callback averages weights (EMA): it puts its average in place during a validation, and takes it
    out before `on_validation_end`.
    """
    averages = [callback for callback in connected(trainer).callbacks if isinstance(callback, WeightAveraging)]
    averages = [callback for callback in averages if callback._average_model is not None]
    for callback in averages:
        callback._swap_models(pl_module)
    try:
        yield
    finally:
        for callback in reversed(averages):
            callback._swap_models(pl_module)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Run the block in eval mode, and then restore the mode of each submodule: frozen ones may be in eval mode."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
