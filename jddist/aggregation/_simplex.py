"""The probability simplex."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(like: Tensor, m: int) -> Tensor:
    """The weights 1/m [m], in the dtype and on the device of `like`."""
    return like.new_full((m,), 1.0 / max(m, 1))


def project(point: Tensor) -> Tensor:
    """The weights [m] of sum 1 that are closest to `point`.

    They are max(point - t, 0), where t makes the sum 1: of the k largest entries, t is their mean
    excess for the greatest k whose smallest entry still exceeds it.
    """
    if point.numel() == 0:
        return point
    point = point - point.max()  # Only what is within 1 of the maximum counts: nothing cancels.
    ordered = point.sort(descending=True).values
    counts = torch.arange(1, len(point) + 1, dtype=point.dtype, device=point.device)
    shifts = (ordered.cumsum(dim=0) - 1.0) / counts
    positive = (ordered > shifts).sum().clamp(min=1)
    return (point - shifts[positive - 1]).clamp(min=0.0)
