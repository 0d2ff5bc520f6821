"""Tasks: one LightningDataModule per file; none depends on a line of research."""

from datamodules.interleaved_streams import InterleavedStreams
from datamodules.modular_arithmetic import ModularArithmetic
from datamodules.text_corpus import TextCorpus
from datamodules.word_problems import WordProblems

__all__ = ["InterleavedStreams", "ModularArithmetic", "TextCorpus", "WordProblems"]
