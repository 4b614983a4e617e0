"""Memory that is used again at every step: fresh pages cost more than what is computed in them."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

DEFAULT_BUDGET = 40 << 20
"""The default of ``memory_budget``, in bytes."""

# Elements of a tile: large enough for efficient products, small beside a model.
_TILE = 1 << 22


class Scratch:
    """Tiles that are overwritten again and again, and a pool of buffers that are held for a while.

    Args:
        budget: Bytes that tiles and held buffers may take together. A tile is never smaller than
            what a single line of a parameter needs, whatever the budget.
    """

    def __init__(self, budget: int = DEFAULT_BUDGET) -> None:
        self._budget = budget
        self._tiles: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._free: list[Tensor] = []
        self._held = 0

    def tile_elements(self, dtype: torch.dtype) -> int:
        """How many elements a tile should have at most."""
        return max(1, min(_TILE, self._budget // (6 * dtype.itemsize)))

    def tile(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A contiguous tensor of undefined contents, valid until ``name`` is asked for again."""
        size, key = prod(shape), (name, dtype, device)
        buffer = self._tiles.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._tiles[key] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)

    def hold(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        """A contiguous tensor of undefined contents that nobody else gets until ``give_back``.

        None if it does not fit into what the tiles leave of the budget.
        """
        size = prod(shape)
        for i, buffer in enumerate(self._free):
            if buffer.numel() == size and buffer.dtype == dtype and buffer.device == device:
                self._held += buffer.nbytes
                return self._free.pop(i).view(shape)
        needed = size * dtype.itemsize
        # Half of the budget is for tiles, of which up to three have the full size.
        limit = self._budget // 2
        if self._held + needed > limit:
            return None
        while self._free and self._held + needed + sum(b.nbytes for b in self._free) > limit:
            self._free.pop(0)  # it was for a batch of another size
        self._held += needed
        return torch.empty(shape, dtype=dtype, device=device)

    def trim(self) -> None:
        """Frees the buffers that nobody holds: other memory is about to be needed."""
        self._free.clear()

    def give_back(self, tensor: Tensor) -> None:
        """Returns what ``hold`` gave."""
        self._held -= tensor.nbytes
        self._free.append(tensor.view(-1))
