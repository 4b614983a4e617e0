"""Rows of a table of which every sample reads a few lines: embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import JacobianBlock, TiledBlock, compute_dtype
from .cost import matched_flops
from .products import add_square


class LookupBlock(TiledBlock):
    """Rows that are zero but for some lines of a table [V, d]: one entry per sample and line.

    Args:
        samples: The sample of each entry: [n].
        lines: The line of each entry: [n]. A pair of sample and line that comes up several times
            is summed.
        values: The gradients at that line: [n, k, d].
        batch: The number of samples b.
        num_lines: The number of lines V.
    """

    def __init__(
        self, samples: Tensor, lines: Tensor, values: Tensor, batch: int, num_lines: int
    ) -> None:
        assert values.ndim == 3 and samples.shape == lines.shape == values.shape[:1]
        self.dtype = compute_dtype(values)
        self.batch, self.objectives, self.in_features = batch, values.shape[1], values.shape[2]
        self.out_features = num_lines
        self.num_rows = batch * self.objectives
        self.num_columns = num_lines * self.in_features
        self.device = values.device
        # Sorted by line, then by sample.
        keys, entry = torch.unique(lines * batch + samples, return_inverse=True)
        summed = torch.zeros(len(keys), *values.shape[1:], dtype=self.dtype, device=values.device)
        self._values = summed.index_add_(0, entry, values.to(self.dtype))
        self._lines = torch.div(keys, max(1, batch), rounding_mode="floor")
        self._samples = keys - self._lines * batch

    def __len__(self) -> int:
        return len(self._lines)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Samples [n], lines [n] and values [n, k, d], sorted by line, then by sample."""
        return self._samples, self._lines, self._values

    def forget(self) -> None:
        self._values = self._values.new_empty(0)

    def add_gramian(self, total: Tensor) -> None:
        if len(self) == 0:
            return
        distinct, group, counts = torch.unique_consecutive(
            self._lines, return_inverse=True, return_counts=True
        )
        starts = counts.cumsum(0) - counts
        # Within a line the samples ascend: each entry meets those before it and itself.
        matches = torch.arange(len(self), device=self.device) - starts[group] + 1
        pairs = int(matches.sum())
        k, width = self.objectives, self.in_features
        dense = 2.0 * self.num_rows * (self.num_rows + 4) * len(distinct) * width
        if matched_flops(pairs, k, width) <= dense:
            self._add_matched(total, self, starts[group], matches)
            return
        step = max(1, self.scratch.tile_elements(self.dtype) // max(1, self.num_rows * width))
        for start in range(0, len(distinct), step):
            stop = min(len(distinct), start + step)
            shape = (self.batch, k, stop - start, width)
            tile = self.scratch.tile("rows", shape, self.dtype, self.device).zero_()
            chosen = (group >= start) & (group < stop)
            self._scatter(tile, chosen, group[chosen] - start)
            add_square(total, tile.view(self.num_rows, -1))

    def cross(self, other: JacobianBlock) -> Tensor:
        if other is self:
            return self.gramian()
        if not isinstance(other, LookupBlock) or other.objectives != self.objectives:
            return super().cross(other)
        total = torch.zeros(self.num_rows, other.num_rows, dtype=torch.float64, device=self.device)
        first = torch.searchsorted(other._lines, self._lines)
        last = torch.searchsorted(other._lines, self._lines, right=True)
        self._add_matched(total, other, first, last - first)
        return total

    def rows(self) -> Tensor:
        shape = (self.batch, self.objectives, self.out_features, self.in_features)
        rows = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._scatter(rows, slice(None), self._lines)
        return rows.view(self.num_rows, -1)

    def combine(self, weights: Tensor) -> Tensor:
        shaped = weights.to(self.dtype).view(self.batch, self.objectives)
        weighted = (self._values * shaped[self._samples].unsqueeze(2)).sum(dim=1)
        total = torch.zeros(
            self.out_features, self.in_features, dtype=self.dtype, device=self.device
        )
        return total.index_add_(0, self._lines, weighted).view(-1)

    def add(self, other: JacobianBlock) -> JacobianBlock | None:
        if not isinstance(other, LookupBlock):
            return None
        mine, theirs = self.entries(), other.entries()
        dtype = torch.promote_types(self.dtype, other.dtype)
        return LookupBlock(
            torch.cat([mine[0], theirs[0]]),
            torch.cat([mine[1], theirs[1]]),
            torch.cat([mine[2].to(dtype), theirs[2].to(dtype)]),
            self.batch,
            self.out_features,
        )

    def add_tile(self, target: Tensor, start: int, stop: int, *, first: bool) -> None:
        if first:
            target.zero_()
        low, high = torch.searchsorted(
            self._lines, torch.tensor([start, stop], device=self.device)
        ).tolist()
        chosen = slice(low, high)
        self._scatter(target, chosen, self._lines[chosen] - start)

    def _scatter(self, target: Tensor, chosen: Tensor | slice, lines: Tensor) -> None:
        """Adds the chosen entries to ``target`` [b, k, w, d] at the given lines of it."""
        # No two entries have the same place, so that they can be added by index.
        places = target.transpose(1, 2)
        samples, values = self._samples[chosen], self._values[chosen].to(target.dtype)
        places[samples, lines] += values

    def _add_matched(
        self, total: Tensor, other: LookupBlock, first: Tensor, matches: Tensor
    ) -> None:
        """Adds the products of each entry with ``matches`` entries of ``other`` from ``first``."""
        mine = torch.repeat_interleave(torch.arange(len(self), device=self.device), matches)
        before = matches.cumsum(0) - matches
        theirs = torch.arange(len(mine), device=self.device) + (first - before)[mine]
        k, columns = self.objectives, total.shape[1]
        rows = self._samples[mine] * k * columns + other._samples[theirs] * k
        inner = torch.arange(k, device=self.device)
        offsets = (inner.unsqueeze(1) * columns + inner).view(1, -1)
        step = max(1, self.scratch.tile_elements(self.dtype) // (4 * k * self.in_features))
        flat = total.view(-1)
        for start in range(0, len(mine), step):
            part = slice(start, start + step)
            left, right = self._values[mine[part]], other._values[theirs[part]]
            if k == 1:
                products = left.mul_(right.to(left.dtype)).sum(dim=(1, 2))
            else:
                products = torch.bmm(left, right.to(left.dtype).transpose(1, 2))
            at = rows[part].unsqueeze(1) + offsets
            flat.index_add_(0, at.reshape(-1), products.reshape(-1).double())
