"""What callbacks with forward hooks have in common."""

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle


class HookedCallback(Callback):
    """A callback whose forward hooks, kept in `_handles`, come off when a run ends or fails."""

    _handles: Sequence[RemovableHandle] = ()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the hooks off."""
        self._unhook()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes the hooks off here too: Lightning skips `teardown` when a run fails."""
        self._unhook()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
