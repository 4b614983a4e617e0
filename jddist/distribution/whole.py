"""The shape of a whole parameter, of which a wrapper may keep only a slice on each rank."""

from __future__ import annotations

import torch
from torch import Tensor

from ._zero_internals import WHOLE_SHAPE


def shape_of(tensor: Tensor) -> torch.Size:
    """The tensor's shape; of a parameter that ZeRO-3 has partitioned, that of the whole."""
    return torch.Size(getattr(tensor, WHOLE_SHAPE, tensor.shape))


def numel_of(tensor: Tensor) -> int:
    """The number of elements of the whole tensor."""
    return shape_of(tensor).numel()


def is_partitioned(tensor: Tensor) -> bool:
    """Whether it is a parameter of which ZeRO-3 keeps a slice on each rank."""
    return hasattr(tensor, WHOLE_SHAPE)
