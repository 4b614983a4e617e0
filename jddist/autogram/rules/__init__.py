"""Layer rules: from one call of a layer to the rows of its parameters."""

from . import convolution, embedding, linear, norm, prelu  # noqa: F401  (register their rules)
from .registry import Rule, find_rule, register_rule

__all__ = ["Rule", "find_rule", "register_rule"]
