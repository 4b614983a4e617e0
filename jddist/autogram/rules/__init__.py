"""Layer rules: from one call of a layer to the rows of its parameters."""

from . import linear as _linear  # noqa: F401  (registers its rule)
from .registry import Rule, find_rule, register_rule

__all__ = ["Rule", "find_rule", "register_rule"]
