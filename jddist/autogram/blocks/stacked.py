"""Rows of several batches, one batch after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import JacobianBlock, compute_dtype


class StackedBlock(JacobianBlock):
    """The rows [m, p] of several blocks, stacked.

    Args:
        parts: The blocks; None where the rows are all zero. At least one is a block.
        counts: The number of rows of each.
    """

    def __init__(self, parts: Sequence[JacobianBlock | None], counts: Sequence[int]) -> None:
        present = [part for part in parts if part is not None]
        self.num_rows = sum(counts)
        self.num_columns = present[0].num_columns
        self.device = present[0].device
        self._starts = [sum(counts[:i]) for i in range(len(counts))]
        self._counts = list(counts)
        self._parts = list(parts)

    def add_gramian(self, total: Tensor) -> None:
        for i, lower in enumerate(self._parts):
            if lower is None:
                continue
            rows = slice(self._starts[i], self._starts[i] + self._counts[i])
            total[rows, rows] += lower.gramian()
            for j, upper in enumerate(self._parts[:i]):
                if upper is not None:
                    columns = slice(self._starts[j], self._starts[j] + self._counts[j])
                    total[rows, columns] += lower.cross(upper)

    def rows(self) -> Tensor:
        found = [None if part is None else part.rows() for part in self._parts]
        dtype = compute_dtype(*(rows for rows in found if rows is not None))
        return torch.cat(
            [
                torch.zeros(count, self.num_columns, dtype=dtype, device=self.device)
                if rows is None
                else rows.to(dtype)
                for rows, count in zip(found, self._counts, strict=True)
            ]
        )

    def combine(self, weights: Tensor) -> Tensor:
        of_parts = weights.split(self._counts)
        return torch.stack(
            [
                part.combine(w)
                for part, w in zip(self._parts, of_parts, strict=True)
                if part is not None
            ]
        ).sum(dim=0)

    def release(self) -> None:
        for part in self._parts:
            if part is not None:
                part.release()
