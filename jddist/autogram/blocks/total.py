"""One parameter used in several places: the sum of blocks of different kinds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import JacobianBlock, TiledBlock
from .dense import DenseBlock
from .products import add_square
from .scratch import Scratch


class TotalBlock(TiledBlock):
    """The sum of blocks of one matrix [out, in], as a token embedding tied to the output head.

    Its rows are formed some lines at a time, all parts in one tile: the products between different
    parts come by themselves.
    """

    def __init__(self, parts: Sequence[TiledBlock]) -> None:
        one = parts[0]
        self.parts = tuple(parts)
        self.batch, self.objectives = one.batch, one.objectives
        self.out_features, self.in_features = one.out_features, one.in_features
        self.num_rows, self.num_columns = one.num_rows, one.num_columns
        self.device, self.dtype = one.device, one.dtype
        for part in parts[1:]:
            self.dtype = torch.promote_types(self.dtype, part.dtype)
        for part in parts:
            part.dtype = self.dtype

    def lend(self, scratch: Scratch, *, keep: bool) -> None:
        super().lend(scratch, keep=keep)
        for part in self.parts:
            part.lend(scratch, keep=False)

    def forget(self) -> None:
        for part in self.parts:
            part.forget()

    def add_gramian(self, total: Tensor) -> None:
        for tile in self._tiles(self.tile_width(self.num_rows)):
            add_square(total, tile)

    def rows(self) -> Tensor:
        shape = (self.batch, self.objectives, self.out_features, self.in_features)
        rows = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.add_tile(rows, 0, self.out_features, first=True)
        return rows.view(self.num_rows, -1)

    def combine(self, weights: Tensor) -> Tensor:
        return torch.stack([part.combine(weights) for part in self.parts]).sum(dim=0)

    def add_tile(self, target: Tensor, start: int, stop: int, *, first: bool) -> None:
        for i, part in enumerate(self.parts):
            part.add_tile(target, start, stop, first=first and i == 0)


def sum_blocks(blocks: Sequence[JacobianBlock]) -> JacobianBlock:
    """The block of the sum of several Jacobians with respect to one parameter."""
    kinds: list[JacobianBlock] = []
    for block in blocks:
        for i, known in enumerate(kinds):
            joined = known.add(block)
            if joined is not None:
                kinds[i] = joined
                break
        else:
            kinds.append(block)
    if len(kinds) == 1:
        return kinds[0]
    tiled = [block for block in kinds if isinstance(block, TiledBlock) and block.is_plain]
    if len(tiled) == len(kinds):
        return TotalBlock(tiled)
    total = kinds[0].rows()
    for block in kinds[1:]:
        total = total + block.rows()
    return DenseBlock(total)
