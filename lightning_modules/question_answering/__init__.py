"""Language-model training: the embedded pair, and fine-tuning of hub models."""

from lightning_modules.question_answering.module import LanguageModel

__all__ = ["LanguageModel"]
