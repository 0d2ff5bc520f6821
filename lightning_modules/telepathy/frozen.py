"""A model that is used and never trained."""

from typing import Any

from torch import nn


class Frozen(nn.Module):
    """Hold a model without gradient, in eval mode, outside checkpoints, and shared by copies.

    A checkpoint leaves it out by a hook on this very module, which `AveragedModel` copies too; overriding
    `state_dict` of the whole would be bypassed there. Another puts it back when a checkpoint is loaded, which weight
    averaging does strictly. A deep copy, which weight averaging makes, is this same object,
    so that a large model is in memory once.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.training = False
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_put_back)

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in eval mode."""
        return self

    def __deepcopy__(self, memo: dict) -> "Frozen":
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.model(*args, **kwargs)


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def _put_back(module: Frozen, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict |= {f"{prefix}model.{name}": value for name, value in module.model.state_dict().items()}
