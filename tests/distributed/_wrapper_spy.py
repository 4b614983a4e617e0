"""Counts what ``fully_shard`` itself sends: one entry per message, in bytes sent by this rank.

jddist's own messages go past it; ``_spy`` counts those. Bytes follow the same ring convention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from tests.distributed._spy import caller

# Renamed in torch 2.13.
_ALL_GATHER = "all_gather_single"
_REDUCE_SCATTER = "reduce_scatter_single"
if not hasattr(dist, _ALL_GATHER):
    _ALL_GATHER, _REDUCE_SCATTER = "all_gather_into_tensor", "reduce_scatter_tensor"


@contextmanager
def spying_on_wrapper() -> Iterator[list[tuple[str, float]]]:
    """Yields the list of (operation, bytes sent by this rank), which grows."""
    log: list[tuple[str, float]] = []
    all_gather, reduce_scatter = getattr(dist, _ALL_GATHER), getattr(dist, _REDUCE_SCATTER)
    all_reduce = dist.all_reduce

    def gather(output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        size = dist.get_world_size(kwargs["group"])
        log.append(("all_gather", float((size - 1) * input_tensor.nbytes)))
        return all_gather(output_tensor, input_tensor, *args, **kwargs)

    def scatter(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        size = dist.get_world_size(kwargs["group"])
        log.append(("reduce_scatter", (size - 1) / size * input.nbytes))
        return reduce_scatter(output, input, *args, **kwargs)

    def reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if caller().startswith("torch."):
            size = dist.get_world_size(kwargs["group"])
            log.append(("all_reduce", 2 * (size - 1) / size * tensor.nbytes))
        return all_reduce(tensor, *args, **kwargs)

    with (
        patch.object(dist, _ALL_GATHER, gather),
        patch.object(dist, _REDUCE_SCATTER, scatter),
        patch.object(dist, "all_reduce", reduce),
    ):
        yield log


def totals(log: list[tuple[str, float]]) -> dict[str, list[float]]:
    """For each operation how many messages there were, and their bytes."""
    found: dict[str, list[float]] = {}
    for operation, sent in log:
        count, total = found.setdefault(operation, [0, 0.0])
        found[operation] = [count + 1, total + sent]
    return found
