"""Rows that are sums of outer products: Linear layers, convolutions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from weakref import ref

import torch
from torch import Tensor

from .base import JacobianBlock, TiledBlock, compute_dtype
from .cost import materialised_flops, pairwise_flops
from .matmul import SMALL, SMALL_SQUARE, put_product, times_transposed
from .patches import Patches
from .products import add_square, bands

# Products of fewer lines than that are slow.
_NARROW = 128


@dataclass(frozen=True)
class ColumnOrder:
    """Where the columns of an outer product belong in the parameter.

    Attributes:
        shape: The shape of the outer product's columns, of out * in elements.
        permutation: The order of its dimensions in the parameter.
    """

    shape: tuple[int, ...]
    permutation: tuple[int, ...]

    def apply(self, columns: Tensor) -> Tensor:
        """[..., out * in] in the parameter's order."""
        lead = columns.shape[:-1]
        dims = [*range(len(lead)), *(len(lead) + d for d in self.permutation)]
        return columns.reshape(*lead, *self.shape).permute(dims).reshape(*lead, -1)


class OuterBlock(TiledBlock):
    """Rows that are sums over positions t of outer products g_t a_t^T.

    Args:
        inputs: ``a`` [b, t, in], or None if the columns of the weight are not wanted.
        grads: ``g`` [b, k, t, out].
        ones: Whether the columns of a bias, whose input is the constant one, are wanted too. They
            come behind those of the weight.
        order: The order of the weight's columns, if it is not [out, in].

    Attributes:
        positions: The number of positions t over which the outer products are summed.
    """

    def __init__(
        self,
        inputs: Tensor | Patches | None,
        grads: Tensor,
        ones: bool = False,
        order: ColumnOrder | None = None,
    ) -> None:
        assert inputs is not None or ones
        assert grads.ndim == 4
        assert inputs is None or inputs.shape[:2] == (grads.shape[0], grads.shape[2])
        self._parts: tuple[tuple[Tensor | Patches | None, Tensor], ...] = ((inputs, grads),)
        # Weak: they tell which blocks share gradients, also when those are gone.
        self._sources: tuple[ref[Tensor], ...] = (ref(grads),)
        self.positions = grads.shape[2]
        self.dtype = compute_dtype(grads)
        if inputs is not None:
            self.dtype = torch.promote_types(self.dtype, inputs.dtype)
        self.ones = ones
        self._order = order
        self.batch, self.objectives, _, self.out_features = grads.shape
        self.in_features = 0 if inputs is None else inputs.shape[2]
        self.num_rows = self.batch * self.objectives
        self.num_columns = self.out_features * (self.in_features + int(ones))
        self.device = grads.device
        self._kept: Tensor | None = None
        self._is_lent = False
        self._bias: Tensor | None = None

    def factors(self) -> tuple[Tensor | None, Tensor]:
        """``a`` [b, t, in] (or None) and ``g`` [b, k, t, out] over all positions."""
        grads = [g.to(self.dtype) for _, g in self._parts]
        joined = grads[0] if len(grads) == 1 else torch.cat(grads, dim=2)
        if not self.in_features:
            return None, joined
        inputs = [self._samples(a, 0, self.batch, fresh=True) for a, _ in self._parts]
        return inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1), joined

    def shares_grads(self, other: OuterBlock) -> bool:
        """Whether both blocks come from the same gradients, as a weight and its bias do."""
        return len(self._sources) == len(other._sources) and all(
            mine is theirs for mine, theirs in zip(self._sources, other._sources, strict=True)
        )

    def with_bias(self) -> OuterBlock:
        """This block with the columns of the bias appended."""
        assert self.in_features and not self.ones
        block = OuterBlock(*self._parts[0], ones=True, order=self._order)
        block._take_parts(self._parts)
        block.dtype = self.dtype
        block._scratch = self._scratch
        return block

    def prefers_pairs(self, other: OuterBlock | None = None) -> bool:
        """Whether rows are better multiplied pair by pair, without being formed."""
        if not self._parts:
            return False  # all that is left are the rows
        two = other or self
        sizes = (self.batch, self.positions, two.batch, two.positions)
        dims = (self.objectives, max(self.in_features, 1), self.out_features)
        own = two is self
        return pairwise_flops(*sizes, *dims, own=own) <= materialised_flops(*sizes, *dims, own=own)

    def cross(self, other: JacobianBlock) -> Tensor:
        if other is self:
            return self.gramian()
        if not isinstance(other, OuterBlock) or not self._is_like(other):
            return super().cross(other)
        if not self._parts or not other._parts:
            return super().cross(other)
        if self.prefers_pairs(other):
            total = torch.zeros(
                self.num_rows, other.num_rows, dtype=torch.float64, device=self.device
            )
            self._add_pairs(total, other)
            return total
        return self._cross_rows(other)

    def add_gramian(self, total: Tensor) -> None:
        if self.prefers_pairs():
            self._add_pairs(total, self)
            return
        if self.in_features:
            for tile in self._own_tiles():
                add_square(total, tile, self.num_columns)
        if self.ones:
            add_square(total, self.bias_rows())

    def add_gramian_and_crosses(
        self, total: Tensor, others: Sequence[OuterBlock], crosses: Sequence[Tensor]
    ) -> None:
        """``add_gramian`` and the products with other blocks' rows, these rows being formed once.

        Args:
            total: See ``add_gramian``.
            others: Blocks of the same weight's columns, and perhaps of a bias's, which are left
                out.
            crosses: For each the products [m, m'], float64, to which its own are added.
        """
        assert self.in_features and not self.ones
        width = self.tile_width(max([self.num_rows, *(other.num_rows for other in others)]))
        start = 0
        for tile in self._own_tiles(width):
            add_square(total, tile, self.num_columns)
            lines = tile.view(self.num_rows, -1, self.in_features)
            count = lines.shape[1]
            for low in range(0, count, width):
                mine = lines[:, low : low + width].flatten(1)
                stop = start + min(count, low + width)
                for other, cross in zip(others, crosses, strict=True):
                    theirs = other._tile(start + low, stop)
                    dtype = torch.promote_types(mine.dtype, theirs.dtype)
                    cross += times_transposed(mine.to(dtype), theirs.to(dtype))
            start += count

    def _tile(self, start: int, stop: int) -> Tensor:
        """Lines ``start`` to ``stop`` of all rows, in scratch memory: [m, (stop - start) * in]."""
        shape = (self.batch, self.objectives, stop - start, self.in_features)
        found = self.scratch.tile("other rows", shape, self.dtype, self.device)
        self.add_tile(found, start, stop, first=True)
        return found.view(self.num_rows, -1)

    def rows(self) -> Tensor:
        pieces = []
        if self.in_features:
            weight = self._kept
            if weight is None:
                shape = (self.batch, self.objectives, self.out_features, self.in_features)
                weight = torch.empty(shape, dtype=self.dtype, device=self.device)
                self.add_tile(weight, 0, self.out_features, first=True)
                weight = weight.view(self.num_rows, -1)
            pieces.append(weight if self._order is None else self._order.apply(weight))
        if self.ones:
            pieces.append(self.bias_rows())
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]

    def combine(self, weights: Tensor) -> Tensor:
        assert self._parts or self._kept is not None or self._bias is not None, "forgotten"
        weights = weights.to(self.dtype)
        shaped = weights.view(self.batch, self.objectives)
        bias = torch.zeros(self.out_features, dtype=self.dtype, device=self.device)
        pieces = []
        if self.in_features and self._kept is not None:
            pieces.append(self._kept.T @ weights)
        elif self.in_features:
            weight: Tensor | None = None
            for inputs, grads in self._parts:
                weight = self._add_combined(weight, bias, inputs, grads, shaped)
            if weight is None:
                weight = bias.new_zeros(self.out_features, self.in_features)
            pieces.append(weight.view(-1))
        if pieces and self._order is not None:
            pieces = [self._order.apply(pieces[0])]
        if self.ones:
            if not self.in_features or self._kept is not None:
                bias = weights @ self.bias_rows()
            pieces.append(bias)
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def add(self, other: JacobianBlock) -> JacobianBlock | None:
        if not isinstance(other, OuterBlock) or not self._is_like(other):
            return None
        total = OuterBlock(*self._parts[0], ones=self.ones, order=self._order)
        total._take_parts(self._parts + other._parts)
        total.dtype = torch.promote_types(self.dtype, other.dtype)
        return total

    @property
    def is_plain(self) -> bool:
        return self.in_features > 0 and not self.ones and self._order is None

    def add_tile(self, target: Tensor, start: int, stop: int, *, first: bool) -> None:
        lines = self.objectives * (stop - start)
        for inputs, grads in self._parts:
            if isinstance(inputs, Patches) and inputs.convolves:
                for samples, rows in inputs.row_tiles(grads[:, 0, :, start:stop], target):
                    out = target[samples, 0]
                    out.copy_(rows) if first else out.add_(rows)
                    del rows  # or those of the next samples lie beside them
                first = False
                continue
            for low, high in self._sample_ranges(inputs):
                a = self._samples(inputs, low, high)
                g = grads[low:high, ..., start:stop].to(self.dtype).transpose(2, 3)
                g = g.reshape(high - low, lines, -1)
                out = target[low:high].view(high - low, lines, self.in_features)
                if first:
                    torch.bmm(g, a, out=out)
                else:
                    out.baddbmm_(g, a)
            first = False

    def release(self) -> None:
        if self._kept is not None and self._is_lent:
            self.scratch.give_back(self._kept)
        self._kept, self._is_lent = None, False

    def forget(self) -> None:
        self.release()
        self._parts, self._bias = (), None

    def _take_parts(self, parts: tuple[tuple[Tensor | Patches | None, Tensor], ...]) -> None:
        self._parts = parts
        self._sources = tuple(ref(grads) for _, grads in parts)
        self.positions = sum(grads.shape[2] for _, grads in parts)

    def _forget_factors(self) -> None:
        """Lets go of the factors once all columns are held as rows."""
        held = not self.in_features or self._kept is not None
        if held and (not self.ones or self._bias is not None):
            self._parts = ()

    def _is_like(self, other: OuterBlock) -> bool:
        return (
            other.objectives == self.objectives
            and other.in_features == self.in_features
            and other.out_features == self.out_features
            and other.ones == self.ones
            and other._order == self._order
        )

    def _sample_ranges(
        self, inputs: Tensor | Patches | None, parts: int = 1
    ) -> Iterator[tuple[int, int]]:
        """Cuts the samples into ranges whose patches fit into one of the ``parts`` of a tile."""
        step = self.batch
        if isinstance(inputs, Patches):
            room = self.scratch.tile_elements(self.dtype) // parts
            step = max(1, room // max(1, prod(inputs.shape[1:])))
        for low in range(0, self.batch, max(1, step)):
            yield low, min(self.batch, low + step)

    def _samples(
        self, inputs: Tensor | Patches | None, low: int, high: int, *, fresh: bool = False
    ) -> Tensor:
        assert inputs is not None
        if isinstance(inputs, Patches):
            return inputs.samples(low, high, self.dtype, None if fresh else self.scratch)
        return inputs[low:high].to(self.dtype)

    def bias_rows(self) -> Tensor:
        """The columns of the bias of all rows: [m, out]."""
        if self._bias is not None:
            return self._bias
        sums = [
            g[:, :, 0].to(self.dtype) if g.shape[2] == 1 else g.sum(dim=2, dtype=self.dtype)
            for _, g in self._parts
        ]
        total = sums[0]
        for more in sums[1:]:
            total = total + more
        total = total.reshape(self.num_rows, self.out_features)
        if self._may_keep:
            self._bias = total
            self._forget_factors()
        return total

    def _own_tiles(self, width: int | None = None) -> Iterator[Tensor]:
        """The weight's columns of all rows, held at once if that is the smaller form or if there
        is memory for it, or in tiles."""
        if self._may_keep and self._kept is None:
            shape = (self.batch, self.objectives, self.out_features, self.in_features)
            if prod(shape) <= self._factor_elements():
                whole: Tensor | None = torch.empty(shape, dtype=self.dtype, device=self.device)
            else:
                whole = self.scratch.hold(shape, self.dtype, self.device)
                self._is_lent = whole is not None
            if whole is not None:
                self.add_tile(whole, 0, self.out_features, first=True)
                self._kept = whole.view(self.num_rows, -1)
                self._forget_factors()
        if self._kept is not None:
            yield self._kept
        else:
            yield from self._tiles(self.tile_width(self.num_rows) if width is None else width)

    def _factor_elements(self) -> int:
        return sum(
            grads.numel() + (0 if inputs is None else inputs.numel())
            for inputs, grads in self._parts
        )

    def _cross_rows(self, other: OuterBlock) -> Tensor:
        total = torch.zeros(self.num_rows, other.num_rows, dtype=torch.float64, device=self.device)
        if self.in_features:
            width = self.tile_width(max(self.num_rows, other.num_rows))
            pairs = zip(self._tiles(width), other._tiles(width, "other rows"), strict=True)
            for mine, theirs in pairs:
                total += times_transposed(mine, theirs)
        if self.ones:
            total += self.bias_rows() @ other.bias_rows().T
        return total

    def _add_pairs(self, total: Tensor, other: OuterBlock) -> None:
        """Adds (A A^T + 1 if bias) * (G G^T), summed over pairs of positions, to ``total``."""
        a1, g1 = self.factors()
        a2, g2 = (a1, g1) if other is self else other.factors()
        b1, k, t1, out = g1.shape
        b2, _, t2, _ = g2.shape
        left = g1.reshape(-1, out)
        right = left if other is self else g2.reshape(-1, out)
        limit = max(1, self.scratch.tile_elements(self.dtype) // max(1, k * k * t1 * b2 * t2))
        # Many tiles of one large product count as one.
        large = b1 * t1 * b2 * t2 * (k * k * out + self.in_features) > 2 * SMALL
        least = SMALL_SQUARE if large else SMALL
        for low, high, end in _bands_of_samples(b1, b2, limit, own=other is self):
            n = high - low
            mine, theirs = left[low * k * t1 : high * k * t1], right[: end * k * t2]
            grads = self._product("left", mine, theirs, least)
            products = grads.view(n, k, t1, end, k, t2)
            if a1 is not None and a2 is not None:
                mine = a1[low:high].reshape(n * t1, self.in_features)
                theirs = a2[:end].reshape(end * t2, self.in_features)
                inputs = self._product("right", mine, theirs, least)
                if self.ones:
                    inputs += 1
                products.mul_(inputs.view(n, 1, t1, end, 1, t2))
            sums = products[:, :, 0, ..., 0] if t1 * t2 == 1 else products.sum(dim=(2, 5))
            total[low * k : high * k, : end * k] += sums.reshape(n * k, end * k)

    def _product(self, name: str, left: Tensor, right: Tensor, least: int) -> Tensor:
        """``left @ right.T``, perhaps in scratch memory."""
        shape = (len(left), len(right))
        scratch, dtype, device = self.scratch, self.dtype, self.device
        tile = partial(scratch.tile, name, shape, dtype, device)
        return times_transposed(left, right, tile, least)

    def _add_combined(
        self,
        weight: Tensor | None,
        bias: Tensor,
        inputs: Tensor | Patches | None,
        grads: Tensor,
        weights: Tensor,
    ) -> Tensor | None:
        """``weight`` [out, in], None for zero, plus sum_i w_i J_i of one part; the same is added to
        ``bias`` [out]."""
        if isinstance(inputs, Patches) and inputs.convolves:
            weighted = grads[:, 0] * weights[:, :, None]
            if self.ones:
                bias += weighted.sum(dim=(0, 1))
            summed = inputs.combined(weighted)
            return summed if weight is None else weight.add_(summed)
        for low, high in self._sample_ranges(inputs, parts=4):  # three more are made of them
            a = self._samples(inputs, low, high).reshape(-1, self.in_features)
            width = max(_NARROW, self.scratch.tile_elements(self.dtype) // (4 * max(1, len(a))))
            found = weight
            for start in range(0, self.out_features, width):
                g = grads[low:high, ..., start : start + width].to(self.dtype)
                if self.objectives == 1:
                    weighted = g[:, 0] * weights[low:high, :, None]
                else:
                    weighted = torch.einsum("bk,bkto->bto", weights[low:high], g)
                flat = weighted.reshape(len(a), g.shape[-1])
                if weight is not None:
                    weight[start : start + width].addmm_(flat.T, a)
                elif width >= self.out_features:
                    found = times_transposed(flat.T, a.T)
                else:
                    if found is None:
                        found = a.new_empty(self.out_features, self.in_features)
                    put_product(found[start : start + width], flat.T, a.T)
                if self.ones:
                    bias[start : start + width] += flat.sum(dim=0)
            weight = found
        return weight


def _bands_of_samples(b1: int, b2: int, limit: int, *, own: bool) -> Iterator[tuple[int, int, int]]:
    """(low, high, end): samples low to high of one set meet samples 0 to end of the other."""
    for start, stop in bands(b1) if own else [(0, b1)]:
        for low in range(start, stop, limit):
            high = min(stop, low + limit)
            yield low, high, stop if own else b2
