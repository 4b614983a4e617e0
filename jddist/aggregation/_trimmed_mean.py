"""The mean of the rows without the extreme values of each column."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from jddist._checked import Checked
from jddist.linalg.matrix import Matrix

from ._bases import Aggregator
from ._columns import UsesSettings


class TrimmedMean(Aggregator, UsesSettings):
    """Averages each column of the Jacobian without its largest and smallest values.

    "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (arXiv:1803.01498),
    Definition 2.

    Args:
        trim_number: How many values to leave out at either end of each column (>= 0).

    Raises:
        ValueError: `trim_number` is negative, or at call time there are fewer than
            2 * trim_number + 1 rows.
    """

    columnwise: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ("trim_number",)

    trim_number = Checked[int](lambda value: value >= 0, "non-negative")

    def __init__(self, trim_number: int) -> None:
        super().__init__()
        self.trim_number = trim_number

    def forward(self, matrix: Matrix, /) -> Tensor:
        m, needed = matrix.shape[0], 2 * self.trim_number + 1
        if m < needed:
            raise ValueError(
                f"Trimming {self.trim_number} values at either end needs {needed} objectives at "
                f"least. Found {m} (rows of a tensor of shape {tuple(matrix.shape)}): lower "
                "trim_number."
            )
        in_order = matrix.sort(dim=0).values
        return in_order[self.trim_number : m - self.trim_number].mean(dim=0)

    def __repr__(self) -> str:
        return f"TrimmedMean(trim_number={self.trim_number})"

    def __str__(self) -> str:
        return f"TM{self.trim_number}"
