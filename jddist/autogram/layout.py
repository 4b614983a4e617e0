"""How the elements of an output are the rows of the Jacobian, and back to the documented shapes.

Inside the engine the objectives of a batched output are ordered sample by sample (row i * k + j is
objective j of sample i): so the rows of several ranks, one rank after the other, are the rows of
the concatenated batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class OutputLayout:
    """The shape of an output and which of its dimensions counts samples.

    Args:
        shape: The output's shape.
        batch_dim: The dimension of the samples, non-negative, or None.
    """

    shape: tuple[int, ...]
    batch_dim: int | None

    @staticmethod
    def of(output: Tensor, batch_dim: int | None) -> OutputLayout:
        """Raises ValueError if ``output`` has no dimension ``batch_dim``."""
        if batch_dim is not None:
            if not -output.ndim <= batch_dim < output.ndim:
                raise ValueError(
                    f"Found an output of shape {tuple(output.shape)} with batch_dim={batch_dim}; "
                    f"expected an output with such a dimension. Pass the vector of losses "
                    "(reduction='none'), or use batch_dim=None."
                )
            batch_dim %= output.ndim
        return OutputLayout(tuple(output.shape), batch_dim)

    @property
    def batch(self) -> int:
        """b: the number of samples; 1 without a batch dimension."""
        return 1 if self.batch_dim is None else self.shape[self.batch_dim]

    @property
    def objectives(self) -> int:
        """k: the number of objectives of each sample."""
        return prod(s for d, s in enumerate(self.shape) if d != self.batch_dim)

    @property
    def num_rows(self) -> int:
        """m = b * k."""
        return prod(self.shape)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """A tensor of the output's shape as a vector [m] in the engine's order of rows."""
        if self.batch_dim is not None:
            tensor = tensor.movedim(self.batch_dim, 0)
        return tensor.reshape(-1)

    def shaped(self, rows: Tensor) -> Tensor:
        """The inverse of ``rows_of``: [m] -> the output's shape."""
        if self.batch_dim is None:
            return rows.reshape(self.shape)
        rest = [s for d, s in enumerate(self.shape) if d != self.batch_dim]
        return rows.reshape([self.batch, *rest]).movedim(0, self.batch_dim)

    def index_of(self, row: int) -> str:
        """Where a row of the engine's order stands in the output, in words."""
        rows = self.shaped(torch.arange(self.num_rows))
        index = (rows == row).nonzero()[0].tolist()
        return str(index[0]) if len(index) == 1 else str(index)

    def generalized(self, gramian: Tensor, other: OutputLayout | None = None) -> Tensor:
        """[m, m'] in the engine's order -> the generalized Gramian [m1, ..., mk, mk', ..., m1'].

        Args:
            gramian: A Gramian, or the inner products with the rows of another output.
            other: The layout of the other output, if it is another one.
        """
        half, order = self._rows_as_dims()
        other_half, other_order = (other or self)._rows_as_dims()
        full = gramian.reshape(half + other_half)
        return full.permute([*order, *(len(half) + d for d in reversed(other_order))])

    def _rows_as_dims(self) -> tuple[list[int], list[int]]:
        """The dimensions that rows unflatten to, and where each of the output's is among them."""
        ndim = len(self.shape)
        if self.batch_dim is None:
            return list(self.shape), list(range(ndim))
        rest = [d for d in range(ndim) if d != self.batch_dim]
        order = [0] * ndim
        for position, dim in enumerate([self.batch_dim, *rest]):
            order[dim] = position
        return [self.batch, *(self.shape[d] for d in rest)], order

    @property
    def sharded_dim(self) -> int:
        """The dimension along which the objectives of several ranks are concatenated."""
        return 0 if self.batch_dim is None else self.batch_dim

    @property
    def size(self) -> int:
        """The size of that dimension; 1 for a scalar."""
        return self.shape[self.sharded_dim] if self.shape else 1

    def resized(self, size: int) -> OutputLayout:
        """The layout of the same output with another size of the sharded dimension."""
        shape = list(self.shape)
        shape[self.sharded_dim] = size
        return OutputLayout(tuple(shape), self.batch_dim)
