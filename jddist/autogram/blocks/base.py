"""What every block of rows can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from .matmul import times_transposed
from .products import mirror_
from .scratch import Scratch


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which rows are multiplied: at least float32, whatever the activations are."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class JacobianBlock(ABC):
    """Rows [m, p] of the Jacobian for p parameters."""

    num_rows: int
    num_columns: int
    device: torch.device
    _scratch: Scratch | None = None
    _may_keep = False

    @property
    def scratch(self) -> Scratch:
        """Memory for intermediate results."""
        if self._scratch is None:
            self._scratch = Scratch()
        return self._scratch

    def lend(self, scratch: Scratch, *, keep: bool) -> None:
        """Gives the block memory to work in.

        Args:
            scratch: The memory.
            keep: Whether rows that the Gramian needed may be held there for ``combine``, until
                ``release``.
        """
        self._scratch, self._may_keep = scratch, keep

    def release(self) -> None:
        """Gives back what the block holds of its scratch memory; it is of no use afterwards."""
        return None  # most blocks hold nothing

    def forget(self) -> None:
        """Lets go of everything but the sizes: the rows have been counted and nobody else wants
        them."""
        self.release()

    @abstractmethod
    def add_gramian(self, total: Tensor) -> None:
        """Adds the products of all pairs of rows to ``total`` [m, m], float64 and contiguous.

        Only the lower triangle counts; what stands above the diagonal afterwards is undefined.
        """

    @abstractmethod
    def rows(self) -> Tensor:
        """All rows: [m, p], in the parameters' order, float32 or better."""

    @abstractmethod
    def combine(self, weights: Tensor) -> Tensor:
        """The weighted sum of the rows: weights [m] -> [p]."""

    def add(self, other: JacobianBlock) -> JacobianBlock | None:
        """The sum of both Jacobians as one block of this kind, or None if there is none."""
        return None

    def cross(self, other: JacobianBlock) -> Tensor:
        """The products of all pairs of rows of two blocks: [m1, m2], float64."""
        if other is self:
            return self.gramian()
        return times_transposed(self.rows(), other.rows()).double()

    def gramian(self) -> Tensor:
        """The products of all pairs of rows: [m, m], float64."""
        total = torch.zeros(self.num_rows, self.num_rows, dtype=torch.float64, device=self.device)
        self.add_gramian(total)
        return mirror_(total)


class TiledBlock(JacobianBlock):
    """Rows of a matrix of parameters [out, in] that can be formed some lines of it at a time.

    Attributes:
        batch: The number of samples b.
        objectives: The number of objectives per sample k.
        out_features: The lines of the matrix.
        in_features: Its columns.
        dtype: The dtype in which rows are formed.
    """

    batch: int
    objectives: int
    out_features: int
    in_features: int
    dtype: torch.dtype

    @abstractmethod
    def add_tile(self, target: Tensor, start: int, stop: int, *, first: bool) -> None:
        """Adds lines ``start`` to ``stop`` of all rows to ``target`` [b, k, stop - start, in].

        Args:
            target: Contiguous.
            start: The first line.
            stop: One past the last line.
            first: Overwrite ``target``, whatever stands there, instead of adding to it.
        """

    @property
    def is_plain(self) -> bool:
        """Whether the columns are the lines one after the other, and nothing else."""
        return True

    def tile_width(self, num_rows: int) -> int:
        """How many lines of ``num_rows`` rows a tile of scratch memory holds."""
        per_line = max(1, num_rows * self.in_features)
        most = max(1, self.scratch.tile_elements(self.dtype) // per_line)
        return max(1, -(-self.out_features // -(-self.out_features // most)))  # of one size

    def _tiles(self, width: int, name: str = "rows") -> Iterator[Tensor]:
        """All rows in tiles of lines, in scratch memory: [m, width * in]."""
        for start in range(0, self.out_features, width):
            stop = min(self.out_features, start + width)
            shape = (self.batch, self.objectives, stop - start, self.in_features)
            tile = self.scratch.tile(name, shape, self.dtype, self.device)
            self.add_tile(tile, start, stop, first=True)
            yield tile.view(self.num_rows, -1)
