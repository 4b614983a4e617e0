"""GradDrop: in every column, entries of one sign are kept and those of the other dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from jddist._seeded import Seeded
from jddist.linalg._format import vector_suffix
from jddist.linalg.matrix import Matrix

from ._bases import Aggregator
from ._columns import UsesSettings, current_columns

# How many columns are drawn at a time, and how many are worked on.
CHUNK = 1 << 20
AT_ONCE = 1 << 16


def _identity(purity: Tensor) -> Tensor:
    return purity


class GradDrop(Aggregator, Seeded, UsesSettings):
    """Keeps, in each column of the Jacobian, the entries of one randomly chosen sign.

    Lines 10 to 15 of Algorithm 1 of "Just Pick a Sign: Optimizing Deep Multitask Models with
    Gradient Sign Dropout" (arXiv:2010.06808). Column j has the positive sign purity
    P = (1 + sum_i J_ij / sum_i |J_ij|) / 2 and a uniform draw U. Its positive entries are kept if
    f(P) > U, its negative ones if f(P) < U; of what is dropped, row i lets the share leak_i pass.

    The draws are one stream `torch.rand(n)`, drawn 2**20 columns at a time (on a GPU, where one
    long draw gives other numbers, this is what defines them). Given some columns only, it draws the
    whole stream and keeps their part: the result does not depend on how the columns are spread, if
    all shards are seeded alike.

    Args:
        f: Applied to the purities, element by element; should increase.
        leak: Shares between 0 and 1, of shape [m]; None means 0 for all rows.
        generator: What to draw from; None for torch's default generator of the Jacobian's device.
            Its state is part of `state_dict`, and has to be the same on all ranks.

    Raises:
        ValueError: `leak` is not a vector, or at call time its length is not m.
    """

    columnwise: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ("leak", "generator_digest")
    differentiable = False  # The choice of a sign has no derivative.

    def __init__(
        self,
        f: Callable[[Tensor], Tensor] = _identity,
        leak: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.f = f
        self.leak = leak

    @property
    def leak(self) -> Tensor | None:
        """How much of each row passes in any case, of shape [m], or None."""
        return self._leak

    @leak.setter
    def leak(self, value: Tensor | None) -> None:
        if value is not None and value.ndim != 1:
            raise ValueError(
                "`leak` must be a vector with one share per objective. Found a tensor of shape "
                f"{tuple(value.shape)}."
            )
        self._leak = value

    def forward(self, matrix: Matrix, /) -> Tensor:
        m, width = matrix.shape
        if self.leak is not None and len(self.leak) != m:
            raise ValueError(
                f"There are {len(self.leak)} leak shares, but {m} objectives (rows of a tensor of "
                f"shape {tuple(matrix.shape)}): give one share per objective."
            )
        columns, result = current_columns(), matrix.new_zeros(width)
        if m == 0:
            return result
        device, total = self.draws_on(matrix.device), columns.total(width)
        for first in range(0, total, CHUNK):
            last = min(first + CHUNK, total)
            draws = torch.rand(
                last - first, generator=self.generator, dtype=matrix.dtype, device=device
            ).to(matrix.device)
            here, places = columns.among(width, first, last)
            mine = draws[places if isinstance(places, slice) else places.to(draws.device)]
            for start in range(here.start, here.stop, AT_ONCE):
                part = slice(start, min(start + AT_ONCE, here.stop))
                of_part = mine[start - here.start : part.stop - here.start]
                result[part] = self._drop(matrix[:, part], of_part)
        return result

    def _drop(self, matrix: Tensor, draws: Tensor) -> Tensor:
        # A column of zeros has the purity 0/0: nothing is kept, and there is nothing to keep.
        purity = self.f(0.5 * (1.0 + matrix.sum(dim=0) / matrix.abs().sum(dim=0)))
        keeps_positive, keeps_negative = purity > draws, purity < draws
        leak = None if self.leak is None else self.leak.to(matrix)
        result = torch.zeros_like(matrix[0])
        for i, row in enumerate(matrix):
            kept = ((row > 0) & keeps_positive) | ((row < 0) & keeps_negative)
            share = kept.to(row) if leak is None else leak[i] + (1.0 - leak[i]) * kept
            result += share * row
        return result

    def __repr__(self) -> str:
        return f"GradDrop(f={self.f!r}, leak={self.leak!r})"

    def __str__(self) -> str:
        return "GradDrop" + vector_suffix(self.leak)
