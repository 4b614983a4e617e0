"""Memory of messages that the next step uses again.

In host memory a fresh page costs more than what is written to it: a step that sends megabytes would
spend as much time on getting the memory as on sending.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes that may lie idle between two steps.
_IDLE = 32 << 20


class Buffers:
    """A pool of vectors of undefined contents; those of a device come from torch's own pool."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A vector that nobody else gets until ``give_back``; without it, it is freed as others."""
        for i, free in enumerate(self._free):
            if free.numel() == numel and free.dtype == dtype and device.type == "cpu":
                return self._free.pop(i)
        return torch.empty(numel, dtype=dtype, device=device)

    def give_back(self, tensor: Tensor) -> None:
        """Returns what ``take`` gave, of which nobody may hold a view any more."""
        if tensor.device.type != "cpu" or tensor.numel() == 0:
            return
        assert all(free.data_ptr() != tensor.data_ptr() for free in self._free), "given back twice"
        self._free.append(tensor.view(-1))
        while sum(free.nbytes for free in self._free) > _IDLE:
            self._free.pop(0)  # the one that was idle for longest
