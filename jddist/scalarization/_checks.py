"""Checks of what scalarizers are given."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import Tensor


def as_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple, n meaning (n,); a ValueError if a size is negative."""
    sizes = (shape,) if isinstance(shape, int) else tuple(operator.index(size) for size in shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"shape must hold non-negative sizes. Found shape={shape!r}.")
    return sizes


def check_same_shape(name: str, tensor: Tensor | None, values: Tensor) -> None:
    """Raises a ValueError if there is a tensor of another shape than the values."""
    if tensor is not None and tensor.shape != values.shape:
        raise ValueError(
            f"The values must have the shape {tuple(tensor.shape)} of {name}. Found values of "
            f"shape {tuple(values.shape)}: give one entry of {name} per value."
        )
