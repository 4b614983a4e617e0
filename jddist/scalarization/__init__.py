"""Scalarizers: from the values of all objectives to one scalar, one file per method."""

from __future__ import annotations

from ._bases import Scalarizer
from ._constant import Constant
from ._mean import Mean
from ._random import Random
from ._sum import Sum

__all__ = ["Constant", "Mean", "Random", "Scalarizer", "Sum"]
