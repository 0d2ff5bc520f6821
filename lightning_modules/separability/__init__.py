"""The separability line: streams that share a small transformer's residual stream."""

from lightning_modules.separability.anchor import Orthogonality
from lightning_modules.separability.module import Separability

__all__ = ["Orthogonality", "Separability"]
