"""Penalties on keys that overlap and on writes at every position, and when they begin.

Shapes: S ensemble members, P penalties.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from datamodules.errors import check_numbers
from lightning_modules.core.sequence_model import Penalties


@dataclass(frozen=True)
class Penalty:
    """A term of the loss. It begins when both conditions hold; before that it is only measured.

    Attributes:
        weight: Factor of the term; 0 only measures.
        from_step: Optimizer step at which it begins.
        from_accuracy: It begins after the first validation whose accuracy reaches this value, and does not end when the
            accuracy falls again; for each member of an ensemble by the accuracy of that member. None for no condition.
    """

    weight: float
    from_step: int = 0
    from_accuracy: float | None = None


@dataclass(frozen=True)
class KeyPenalty(Penalty):
    """The penalty on keys that overlap; see `mixers.writes.key_overlap`.

    Attributes:
        form: `squared` is the mean of cos^2, `absolute` the mean of |cos|. The notes have both. `absolute` takes the
            memory of all pairs of positions.
    """

    form: Literal["squared", "absolute"] = "squared"


class Onsets(nn.Module):
    """The penalties of a model, with what has reached its accuracy.

    Args:
        penalties: The penalties that are set, by their names under `model`.
        members: S.

    Raises:
        UserError: A number is out of range.
    """

    begun_PS: Tensor

    def __init__(self, penalties: Mapping[str, Penalty | None], members: int):
        super().__init__()
        self.penalties = {name: penalty for name, penalty in penalties.items() if penalty is not None}
        for name, penalty in self.penalties.items():
            check_numbers(f"model.{name}", 0, weight=penalty.weight, from_step=penalty.from_step)
            check_numbers(f"model.{name}", 0, 1, from_accuracy=penalty.from_accuracy)
        # On the device, so that a step copies nothing there; not in the state dict, which members' checkpoints share
        begun_PS = torch.tensor([[x.from_accuracy is None] * members for x in self.penalties.values()])
        self.register_buffer("begun_PS", begun_PS, persistent=False)

    def weigh(self, values: Mapping[str, Tensor], step: int) -> Penalties:
        """Return the penalties with their weights at an optimizer step, from their values_S."""
        return {
            name: (penalty.weight * self.begun_PS[index] * (step >= penalty.from_step), values[name])
            for index, (name, penalty) in enumerate(self.penalties.items())
        }

    def advance(self, accuracy_S: Tensor) -> None:
        """Begin what waited for a held-out accuracy."""
        for index, penalty in enumerate(self.penalties.values()):
            if penalty.from_accuracy is not None:
                self.begun_PS[index] |= accuracy_S.to(self.begun_PS.device) >= penalty.from_accuracy

    def begun(self) -> dict[str, list[bool]]:
        """Return which members have reached the accuracy of each penalty, for a checkpoint."""
        return dict(zip(self.penalties, self.begun_PS.tolist(), strict=True))

    def restore(self, begun: Mapping[str, list[bool]]) -> None:
        """Restore what `begun` returned; of penalties that have it in this model too."""
        for index, name in enumerate(self.penalties):
            if len(begun.get(name, ())) == self.begun_PS.shape[1]:
                self.begun_PS[index] |= torch.tensor(begun[name], device=self.begun_PS.device)
