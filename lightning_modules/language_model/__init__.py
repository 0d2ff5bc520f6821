"""Language-model training: the embedded pair, and fine-tuning of hub models."""

from lightning_modules.language_model.module import LanguageModel

__all__ = ["LanguageModel"]
