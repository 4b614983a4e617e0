"""Makes room for the state of an aggregator, so that a checkpoint can be loaded into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from jddist.aggregation import Aggregator
from jddist.aggregation._columns import acting_on
from jddist.aggregation._losses import NeedsLosses
from jddist.distribution.base import Distribution
from jddist.distribution.collectives import column_bounds
from jddist.distribution.columns import RankColumns
from jddist.distribution.select import distribution_of
from jddist.distribution.whole import numel_of


def allocate_state(
    tensors: Iterable[Tensor],
    /,
    aggregator: Aggregator,
    num_objectives: int,
    *,
    distribution: Distribution | None = None,
) -> None:
    """Gives a new aggregator state of the shapes that ``jac_to_grad`` would give it.

    ``torch.distributed.checkpoint`` loads in place, so what it loads must exist with its shape and,
    over several ranks, its shards. Call this and load the checkpoint before the first step: the
    values made here stand for nothing. Nothing is sent and no random stream moves.

    Args:
        tensors: The tensors that ``jac_to_grad`` is going to get, in the same order.
        aggregator: The new aggregator.
        num_objectives: m, the number of rows over all ranks.
        distribution: ``Local()`` if every rank is meant to work alone.
    """
    tensors = list(tensors)
    ranks = distribution_of(tensors, distribution).columns.group
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    total = sum(numel_of(tensor) for tensor in tensors)
    start, stop = column_bounds(total, ranks.size)[ranks.rank]
    device = tensors[0].device
    devices = [device] if device.type != "cpu" else []
    for module in aggregator.modules():
        if isinstance(module, NeedsLosses):
            module.set_losses(torch.ones(num_objectives))
    with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
        with acting_on(_Silent(ranks, total)):
            # Ones: a Jacobian of zeros has no direction, which some methods refuse.
            aggregator(torch.ones(num_objectives, stop - start, dtype=dtype, device=device))


class _Silent(RankColumns):
    """Columns that keep to themselves."""

    def sum(self, partial: Tensor) -> Tensor:
        return partial

    def weigh(self, weighting: Callable[[Tensor], Tensor], statistic: Tensor) -> Tensor:
        return weighting(statistic)
