"""Telepathy: soft tokens between two frozen language models that share no vocabulary."""

from lightning_modules.telepathy.bridges import Bridge, PerceiverBridge, TokenBridge
from lightning_modules.telepathy.flow import FlowBridge
from lightning_modules.telepathy.kv_bridge import KVBridge
from lightning_modules.telepathy.module import Telepathy

__all__ = ["Bridge", "FlowBridge", "KVBridge", "PerceiverBridge", "Telepathy", "TokenBridge"]
