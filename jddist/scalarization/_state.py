"""Tensors of any shape as plain lists, for the extra state of scalarizers.

A tensor in a state_dict has a shape, which distributed checkpoints (DCP) want to find unchanged in
the instance that loads it; a fresh one does not know it yet. Lists have none, and hold all floats
exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_list(tensor: Tensor | None) -> list[Any] | None:
    """The name of the dtype, the shape and the values; None for None."""
    if tensor is None:
        return None
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), tensor.flatten().tolist()]


def from_list(state: list[Any] | None) -> Tensor | None:
    """The tensor of `to_list`, on the CPU."""
    if state is None:
        return None
    dtype, shape, values = state
    return torch.tensor(values, dtype=getattr(torch, dtype)).reshape(shape)
