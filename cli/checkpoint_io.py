"""How checkpoints are written: as whole files."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

from lightning_modules.core.files import replacing


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, which replace the file before them as a whole; see `replacing`.

    Lightning itself writes to the system's folder of temporary files. If that is another file system, a process that is
    killed leaves a damaged checkpoint. It also needs memory for a second copy of the checkpoint, and this does not.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: The content.
            path: The file, or an address such as `s3://...`, which Lightning writes.
            storage_options: As for Lightning, which refuses them.

        Raises:
            OSError: The file cannot be written; a file that was there before is unchanged.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(Path(path)) as draft, open(draft, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch's error does not give the reason
                    raise error.__context__ from error
                raise
