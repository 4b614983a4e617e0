"""The rows of the Jacobian for some parameters, in the cheapest form that a layer offers.

A block has m = b * k rows (sample-major: row i * k + j is objective j of sample i) and p columns.
Blocks know nothing of ranks or layers: they multiply with one another, give their rows, and combine
them with weights.
"""

from .base import JacobianBlock, TiledBlock, compute_dtype
from .dense import DenseBlock
from .lookup import LookupBlock
from .outer import ColumnOrder, OuterBlock
from .patches import Patches, Window
from .scratch import DEFAULT_BUDGET, Scratch
from .stacked import StackedBlock
from .together import add_blocks
from .total import TotalBlock, sum_blocks

__all__ = [
    "DEFAULT_BUDGET",
    "ColumnOrder",
    "DenseBlock",
    "JacobianBlock",
    "LookupBlock",
    "OuterBlock",
    "Patches",
    "Scratch",
    "StackedBlock",
    "TiledBlock",
    "TotalBlock",
    "Window",
    "add_blocks",
    "compute_dtype",
    "sum_blocks",
]
