"""Means over uneven batches: how much each rank's estimate of an objective weighs in the whole."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from torch import Tensor
from torch.distributed.tensor import Placement

from .base import is_average

Count = int | Sequence[int] | Tensor


def checked_count(
    count: Count | None, num_objectives: int, placement: Placement
) -> list[float] | None:
    """``count`` as one number per objective.

    Raises:
        ValueError: It is negative or not finite, has the wrong length, or objectives are no means
            over ranks.
    """
    if count is None:
        return None
    if not is_average(placement):
        raise ValueError(
            f'Found count={count!r} with objectives={placement!r}; expected it with Partial("avg") '
            "only, where objectives are means over samples."
        )
    values = count.reshape(-1).tolist() if isinstance(count, Tensor) else count
    counts = [values] * num_objectives if isinstance(values, int | float) else list(values)
    if len(counts) != num_objectives or not all(0 <= c < inf for c in counts):
        raise ValueError(
            f"Found count={count!r}; expected one finite, non-negative number, or one for each of "
            f"the {num_objectives} objectives."
        )
    return [float(c) for c in counts]


def shares_of_samples(
    counts: Sequence[Sequence[float] | None], num_objectives: int
) -> list[list[float]]:
    """For each rank and objective W * c / (sum of c over ranks); 1 without counts.

    The mean over ranks of share * local mean is then the mean over all samples. An objective
    without any sample has shares of 0.
    """
    if any(c is None for c in counts):
        return [[1.0] * num_objectives for _ in counts]
    known = [c for c in counts if c is not None]
    totals = [sum(c[i] for c in known) for i in range(num_objectives)]
    return [
        [len(known) * n / total if total else 0.0 for n, total in zip(c, totals, strict=True)]
        for c in known
    ]
