"""Layer rules: from one call of a layer to the rows of its parameters."""

from . import (  # noqa: F401  (they register their rules)
    attention,
    convolution,
    embedding,
    linear,
    norm,
    prelu,
)
from .registry import Rule, find_rule, register_rule, replays

__all__ = ["Rule", "find_rule", "register_rule", "replays"]
