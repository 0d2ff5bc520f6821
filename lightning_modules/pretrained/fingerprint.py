"""What identifies a model: its weights and its configuration, whatever its name and folder."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Of a configuration, what says where the model comes from and not what it computes
INDIFFERENT = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")


def fingerprint(model: nn.Module, config: "PreTrainedConfig") -> str:
    """Return the SHA-256 of a model's configuration and of its weights, each with its name, type and shape.

    Args:
        model: The model, or the part of it that is used.
        config: The configuration of the whole model.
    """
    settings: dict[str, Any] = {name: value for name, value in config.to_dict().items() if name not in INDIFFERENT}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {[*value.shape]}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
