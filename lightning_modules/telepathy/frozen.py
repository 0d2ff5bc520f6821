"""A model that is used and never trained."""

from typing import Any

from torch import Tensor, nn


class Frozen(nn.Module):
    """A model without gradients, always in eval mode, left out of checkpoints and shared by copies.

    A hook on this module drops the model from state dicts. Weight averaging copies the hook too, while it would bypass
    an overridden `state_dict` of the whole. A second hook adds the model's weights again when a state dict is loaded,
    since weight averaging loads strictly. A deep copy, which weight averaging makes, is the same object, so a large
    model is in memory once.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.training = False
        self.register_state_dict_post_hook(_drop_model)  # type: ignore[no-untyped-call]  # torch has no types here
        self.register_load_state_dict_pre_hook(_add_model)  # type: ignore[no-untyped-call]  # nor here

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in eval mode."""
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> "Frozen":
        return self

    def forward(self, *args: object, **kwargs: object) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)


def frozen_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers of all frozen models in a module."""
    models = [f"{name}." for name, child in module.named_modules() if isinstance(child, Frozen)]
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return [name for name in names if name.startswith(tuple(models))]


def _drop_model(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: dict[str, object]) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        del state_dict[name]


def _add_model(module: Frozen, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    state_dict |= {f"{prefix}model.{name}": value for name, value in module.model.state_dict().items()}
