"""Lines of research: one package each, a LightningModule and its networks."""

from lightning_modules.language_model import LanguageModel
from lightning_modules.separability import Orthogonality, Separability
from lightning_modules.telepathy import PerceiverBridge, Telepathy, TokenBridge

__all__ = ["LanguageModel", "Orthogonality", "PerceiverBridge", "Separability", "Telepathy", "TokenBridge"]
