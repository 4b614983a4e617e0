"""Checkpoints of a whole training run that survive kills, full disks and other numbers of ranks."""

from ._checkpointer import Checkpointer, Loaded
from ._signals import StopSignals

__all__ = ["Checkpointer", "Loaded", "StopSignals"]
