"""How models are distributed over ranks, and what the ranks exchange."""

from torch.distributed.tensor import DTensor

from jddist.aggregation._columns import register_sharded

from .attach import attach
from .base import Distribution
from .columns import aggregate_dtensor
from .data_parallel import DataParallel
from .local import Local
from .planning import Plan, plan
from .schemes import BlockShape, Scheme

__all__ = [
    "BlockShape",
    "DataParallel",
    "Distribution",
    "Local",
    "Plan",
    "Scheme",
    "attach",
    "plan",
]

# From now on, aggregators accept DTensors.
register_sharded(DTensor, aggregate_dtensor)
