"""Counts what jddist's collectives send: one entry per message, in bytes sent by this rank.

It sits below jddist's own functions, on torch.distributed's. What DDP's reducer sends goes past it.
Bytes follow the ring convention: all_gather (W-1) * input, reduce_scatter (W-1)/W * input,
all_reduce 2 (W-1)/W * size, all_to_all what leaves the rank, broadcast the size on rank 0.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from jddist.distribution import collectives


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def caller() -> str:
    """The module whose message is about to be counted: the first one that is not of the tests."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("tests.distributed"):
        frame = frame.f_back
    return str(frame.f_globals["__name__"])


@contextmanager
def spying(rank: int, world_size: int) -> Iterator[list[tuple[str, float]]]:
    """Yields the list of (operation, bytes sent by this rank), which grows."""
    log: list[tuple[str, float]] = []

    def wrap(name: str, original: Any, sent: Any) -> Any:
        def spied(*args: Any, **kwargs: Any) -> Any:
            if not caller().startswith("jddist."):
                return original(*args, **kwargs)  # a message of the wrapper's
            # A message may go to some of the ranks only.
            size, place = (f(kwargs["group"]) for f in (dist.get_world_size, dist.get_rank))
            assert size <= world_size and (size < world_size or place == rank)
            log.append((name, float(sent(size, place, *args))))
            return original(*args, **kwargs)

        return spied

    def all_to_all(
        size: int, place: int, output: Tensor, input: Tensor, output_sizes: Any, input_sizes: Any
    ) -> int:
        return (input.numel() - input_sizes[place]) * input.element_size()

    spied = {
        (collectives, "_all_gather"): lambda size, place, out, x: (size - 1) * _bytes(x),
        (collectives, "_reduce_scatter"): lambda size, place, out, x: (size - 1) / size * _bytes(x),
        (dist, "all_reduce"): lambda size, place, x: 2 * (size - 1) / size * _bytes(x),
        (dist, "all_to_all_single"): all_to_all,
        (dist, "broadcast"): lambda size, place, x: _bytes(x) if place == 0 else 0,
    }
    forbidden = ("all_gather", "gather", "scatter", "reduce", "send", "recv", "all_gather_object")
    patches = [
        patch.object(owner, name, wrap(name.strip("_"), getattr(owner, name), sent))
        for (owner, name), sent in spied.items()
    ]
    patches += [patch.object(dist, name, side_effect=AssertionError(name)) for name in forbidden]
    for p in patches:
        p.start()
    try:
        yield log
    finally:
        for p in patches:
            p.stop()
