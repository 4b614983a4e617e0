"""The mean of the rows without the extreme values of each column."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from jddist._checked import Checked
from jddist.linalg.matrix import Matrix

from ._bases import Aggregator
from ._columns import UsesSettings

# How many columns are sorted at a time: sorting takes the memory of some copies.
AT_ONCE = 1 << 16


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
        result = matrix.new_empty(matrix.shape[1])
        for start in range(0, len(result), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            in_order = matrix[:, part].sort(dim=0).values
            result[part] = in_order[self.trim_number : m - self.trim_number].mean(dim=0)
        return result

    def __repr__(self) -> str:
        return f"TrimmedMean(trim_number={self.trim_number})"

    def __str__(self) -> str:
        return f"TM{self.trim_number}"
