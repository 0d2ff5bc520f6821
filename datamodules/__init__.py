"""Tasks: one LightningDataModule per file; none depends on a line of research."""

from datamodules.associative_recall import AssociativeRecall
from datamodules.interleaved_streams import InterleavedStreams
from datamodules.memory_items import MemoryItems
from datamodules.mixture import Mixture
from datamodules.modular_arithmetic import ModularArithmetic
from datamodules.needle_gym import NeedleGym
from datamodules.noisy_successor import NoisySuccessor
from datamodules.state_tracking import StateTracking
from datamodules.text_corpus import TextCorpus
from datamodules.word_problems import WordProblems

__all__ = [
    "AssociativeRecall",
    "InterleavedStreams",
    "MemoryItems",
    "Mixture",
    "ModularArithmetic",
    "NeedleGym",
    "NoisySuccessor",
    "StateTracking",
    "TextCorpus",
    "WordProblems",
]
