"""How models are distributed over ranks, and what the ranks exchange."""

from .attach import attach
from .base import Distribution
from .data_parallel import DataParallel
from .local import Local

__all__ = ["DataParallel", "Distribution", "Local", "attach"]
