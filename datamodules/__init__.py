"""Tasks: one LightningDataModule a file; none knows a line of research."""

from datamodules.word_problems import WordProblems

__all__ = ["WordProblems"]
