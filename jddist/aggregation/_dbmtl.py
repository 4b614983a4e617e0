"""DB-MTL: gradients of the logarithms of the losses, averaged over time, of equal lengths."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from jddist._checked import Checked
from jddist._stateful import Stateful
from jddist.linalg.matrix import Matrix

from ._bases import Aggregator
from ._columns import UsesSettings, current_columns, weigh
from ._losses import NeedsLosses
from ._memory import ColumnState

EPS = 1e-8


class DBMTL(Aggregator, NeedsLosses, UsesSettings, Stateful):
    """Sums the moving averages of the rows of the log-losses, all scaled to the longest one.

    "Dual-Balancing for Multi-Task Learning" (arXiv:2308.12029), Algorithm 1. With l the losses, the
    gradient of log(l_i + 1e-8) is J_i / (l_i + 1e-8). Each call updates Y [m, n], 0 at first, and
    returns the sum of its rows, each scaled to the length of the longest:

        Y_i <- beta Y_i + (1 - beta) J_i / (l_i + 1e-8)
        sum_i  max_k |Y_k| / (|Y_i| + 1e-8)  Y_i

    Call `set_losses(losses)` before each call, or `set_losses(torch.ones(m))` if what was
    differentiated already are the logarithms. The paper's variant beta / sqrt(step) is had by
    setting beta between calls.

    It remembers Y, of which each shard keeps its columns. Y starts afresh after `reset` and when
    the Jacobian's shape or dtype changes.

    Args:
        beta: Share of the calls before in the moving average (from 0 to below 1).

    Raises:
        ValueError: beta is out of its range, or the losses of a call were not stated.
    """

    differentiable = False  # The calls before are not part of the graph.
    acts_on_columns = True
    settings: ClassVar[tuple[str, ...]] = ("beta",)

    beta = Checked[float](lambda value: 0.0 <= value < 1.0, "from 0 to below 1")

    def __init__(self, beta: float = 0.9) -> None:
        super().__init__()
        self.averages = ColumnState()
        self.beta = beta

    def reset(self) -> None:
        """Forgets the moving averages."""
        self.averages.reset()

    def forward(self, matrix: Matrix, /) -> Tensor:
        # Every shard divides by the same bits: those of the first one.
        losses = weigh(_unchanged, self._take_losses(matrix))
        averages = self.averages.recall(matrix)
        if averages is None:
            averages = torch.zeros_like(matrix)
        averages.lerp_(matrix / (losses + EPS)[:, None], 1.0 - self.beta)
        self.averages.keep(averages)
        squared_lengths = current_columns().sum(averages.square().sum(dim=1))
        return weigh(_to_longest, squared_lengths) @ averages

    def __repr__(self) -> str:
        return f"DBMTL(beta={self.beta!r})"


def _unchanged(losses: Tensor) -> Tensor:
    return losses


def _to_longest(squared_lengths: Tensor) -> Tensor:
    """The factors [m] that give all rows the length of the longest."""
    lengths = squared_lengths.sqrt()
    longest = lengths.max() if len(lengths) else lengths.sum()
    return longest / (lengths + EPS)
