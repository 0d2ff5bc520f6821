"""Lines of research: one package each, a LightningModule and its networks."""

from lightning_modules.language_model import LanguageModel

__all__ = ["LanguageModel"]
