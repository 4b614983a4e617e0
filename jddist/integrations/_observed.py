"""What a framework's log gets to know of the weights and conflicts of each step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jddist.linalg.gramian import flatten_gramian


class Observed:
    """Watches a weighting, and averages over steps what is worth a line in a log.

    Args:
        weighting: The weighting. It runs on rank 0 alone, so conflicts are known there only.
        single: Up to how many objectives each weight has a value of its own.
    """

    def __init__(self, weighting: Callable[[Tensor], Tensor], *, single: int) -> None:
        self._weighting = weighting
        self._single = single
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def attached(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Within this context, the weighting that is yielded is watched."""
        if not isinstance(self._weighting, nn.Module):
            yield self._watching
            return

        def watch(_module: nn.Module, args: tuple[Any, ...], _weights: Any) -> None:
            self._see(args[0])

        handle = self._weighting.register_forward_hook(watch)
        try:
            yield self._weighting
        finally:
            handle.remove()

    def add(self, weights: Tensor) -> None:
        """Takes the weights of a step."""
        flat = weights.detach().reshape(-1)
        if len(flat) == 0:
            return
        self._add("weight_min", float(flat.min()))
        self._add("weight_max", float(flat.max()))
        self._add("weight_zero", float((flat == 0).double().mean()))
        if len(flat) <= self._single:
            for i, weight in enumerate(flat.tolist()):
                self._add(f"weight_{i}", weight)

    def pop(self) -> dict[str, float]:
        """The means since the last call, by names that begin with ``jd_``."""
        means = {f"jd_{name}": total / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means

    def _watching(self, gramian: Tensor) -> Tensor:
        self._see(gramian)
        return self._weighting(gramian)

    def _see(self, gramian: Tensor) -> None:
        self._add("conflicts", conflicts(flatten_gramian(gramian.detach())))

    def _add(self, name: str, value: float) -> None:
        self._sums[name] += value
        self._counts[name] += 1


def conflicts(gramian: Tensor) -> float:
    """The share of pairs of objectives whose gradients have a negative inner product.

    Args:
        gramian: [m, m].
    """
    m = len(gramian)
    if m < 2:
        return 0.0
    upper = torch.triu(torch.ones_like(gramian, dtype=torch.bool), diagonal=1)
    return float((gramian < 0)[upper].double().mean())
