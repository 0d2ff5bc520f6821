"""The memory of the gated delta rule alone, without a network and without training."""

from lightning_modules.groundthink.mechanism.delta_memory import DeltaMemory

__all__ = ["DeltaMemory"]
