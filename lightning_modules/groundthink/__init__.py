"""The groundthink line: needles in the delta-rule state of a hybrid of a linear recurrence and window attention."""

from lightning_modules.groundthink.module import GroundThink

__all__ = ["GroundThink"]
