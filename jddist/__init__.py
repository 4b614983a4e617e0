"""jddist: exact Jacobian descent on many GPUs, for PyTorch."""

from ._stateful import Stateful
from ._version import __version__
from .autogram import Engine as _Engine  # noqa: F401  (first: the distribution builds on its blocks)
from .distribution import attach
from .verify import verify

__all__ = ["Stateful", "__version__", "attach", "verify"]
