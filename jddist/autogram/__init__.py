"""Gramian-based Jacobian descent: the engine and its layer rules."""

from .engine import Engine
from .rules import register_rule

__all__ = ["Engine", "register_rule"]
