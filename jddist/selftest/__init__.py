"""Checks of the user's own cluster and backend: ``python -m jddist.selftest``, also in torchrun.

It runs the collectives that jddist uses, and trains a small model in each wrapper, against one
process that computes every row of the Jacobian by itself in float64.
"""

from .checks import Check, Finding
from .runner import Result, run

__all__ = ["Check", "Finding", "Result", "run"]
