"""Tasks: one LightningDataModule a file; none knows a line of research."""

from datamodules.interleaved_streams import InterleavedStreams
from datamodules.modular_arithmetic import ModularArithmetic
from datamodules.text_corpus import TextCorpus
from datamodules.word_problems import WordProblems

__all__ = ["InterleavedStreams", "ModularArithmetic", "TextCorpus", "WordProblems"]
