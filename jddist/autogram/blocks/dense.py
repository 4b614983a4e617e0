"""Rows held as they are."""

from __future__ import annotations

from torch import Tensor

from .base import JacobianBlock, compute_dtype
from .products import add_square


class DenseBlock(JacobianBlock):
    """Rows held as they are."""

    def __init__(self, rows: Tensor) -> None:
        assert rows.ndim == 2
        self._rows = rows.to(compute_dtype(rows))
        self.num_rows, self.num_columns = rows.shape
        self.device = rows.device

    def add_gramian(self, total: Tensor) -> None:
        add_square(total, self._rows)

    def rows(self) -> Tensor:
        return self._rows

    def combine(self, weights: Tensor) -> Tensor:
        return weights.to(self._rows.dtype) @ self._rows

    def forget(self) -> None:
        self._rows = self._rows.new_empty(0)

    def add(self, other: JacobianBlock) -> JacobianBlock | None:
        return DenseBlock(self._rows + other.rows())
