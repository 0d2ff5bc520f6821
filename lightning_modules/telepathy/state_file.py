"""A file with the states of a frozen source at some questions.

Shapes: N source positions of all questions of the file, C source width, S source positions of a question.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from datamodules.errors import UserError
from lightning_modules.core.files import replacing

ROWS = 32  # questions that the source reads at a time

States = Callable[[Sequence[str]], list[Tensor]]  # of some questions, states_SC each


@dataclass(frozen=True)
class StateFile:
    """A safetensors file with `states`, [N, C], the key of its cache, and a checksum.

    Attributes:
        path: Where it is.
        key: The key of its cache.
        questions: The questions whose states it holds, in their order.
        lengths: Number S of states of each question.
    """

    path: Path
    key: str
    questions: tuple[str, ...]
    lengths: tuple[int, ...]

    def write(self, states: States) -> str:
        """Write the file; return what hinders it, or an empty text."""
        parts = [
            part for start in range(0, len(self.questions), ROWS) for part in states(self.questions[start:][:ROWS])
        ]
        lengths = tuple(len(part) for part in parts)
        assert lengths == self.lengths, "the source gives other states than its tokens tell"
        tensors = {"states": torch.cat([part.cpu() for part in parts])}
        try:
            with replacing(self.path) as draft:
                draft.write_bytes(save(tensors, {"key": self.key, "sha256": _checksum(tensors["states"])}))
        except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
            return f"{self.path}: {error.strerror}"
        return ""

    def fault(self) -> str | None:
        """Return what is wrong with the file; an empty text if it does not exist, None if nothing is wrong."""
        if not self.path.is_file():
            return ""
        try:
            with safe_open(self.path, "pt") as opened:
                metadata, states_NC = opened.metadata() or {}, opened.get_tensor("states")
        except (SafetensorError, OSError) as error:
            return f"it cannot be read ({str(error).splitlines()[0]})"
        if metadata.get("key") != self.key or len(states_NC) != sum(self.lengths):
            return "it belongs to another cache"
        return None if metadata.get("sha256") == _checksum(states_NC) else "its checksum is wrong"

    def open(self) -> Any:
        """Return states_NC, of which a slice is read when it is taken.

        Raises:
            UserError: The file has vanished since the run began.
        """
        try:
            opened: Any = safe_open(self.path, "pt")
            return opened.__enter__().get_slice("states")
        except (SafetensorError, OSError) as error:
            raise UserError(f"model.cache_source: {self.path} cannot be read: {error}") from error


def _checksum(tensor: Tensor) -> str:
    content: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(content).hexdigest()
