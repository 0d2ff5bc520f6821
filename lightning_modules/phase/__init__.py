"""The phase line: what survives in a memory that every position writes and reads by phase (TPI)?"""

from lightning_modules.phase.module import Phase

__all__ = ["Phase"]
