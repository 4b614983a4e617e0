"""The rows of the Jacobian for some parameters, in the cheapest form that a layer offers.

A block has m = b * k rows (sample-major: row i * k + j is objective j of sample i) and p columns.
Blocks know nothing of ranks or layers: they multiply with one another, give their rows, and combine
them with weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

# Elements of a tile of rows: large enough for efficient products, small beside a model.
_TILE = 1 << 22


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which rows are multiplied: at least float32, whatever the activations are."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class JacobianBlock(ABC):
    """Rows [m, p] of the Jacobian for p parameters."""

    num_rows: int
    num_columns: int
    device: torch.device

    @abstractmethod
    def cross(self, other: Self) -> Tensor:
        """The products of all pairs of rows of two blocks of one kind: [m1, m2], float64."""

    @abstractmethod
    def rows(self) -> Tensor:
        """All rows: [m, p], in the parameters' order, float32 or better."""

    @abstractmethod
    def combine(self, weights: Tensor) -> Tensor:
        """The weighted sum of the rows: weights [m] -> [p]."""

    @abstractmethod
    def add(self, other: JacobianBlock) -> JacobianBlock:
        """The block of the sum of both Jacobians (one parameter used in two places)."""

    def gramian(self) -> Tensor:
        """The products of all pairs of rows: [m, m], float64."""
        return self.cross(self)


class DenseBlock(JacobianBlock):
    """Rows held as they are."""

    def __init__(self, rows: Tensor) -> None:
        assert rows.ndim == 2
        self._rows = rows.to(compute_dtype(rows))
        self.num_rows, self.num_columns = rows.shape
        self.device = rows.device

    def cross(self, other: Self) -> Tensor:
        return (self._rows @ other._rows.T).double()

    def rows(self) -> Tensor:
        return self._rows

    def combine(self, weights: Tensor) -> Tensor:
        return weights.to(self._rows.dtype) @ self._rows

    def add(self, other: JacobianBlock) -> JacobianBlock:
        return DenseBlock(self._rows + other.rows())


class OuterBlock(JacobianBlock):
    """Rows that are sums over positions t of outer products g_t a_t^T.

    Args:
        inputs: ``a`` [b, t, in], or None if the columns of the weight are not wanted.
        grads: ``g`` [b, k, t, out].
        ones: Whether the columns of a bias, whose input is the constant one, are wanted too. They
            come behind those of the weight.
    """

    def __init__(self, inputs: Tensor | None, grads: Tensor, ones: bool = False) -> None:
        assert inputs is not None or ones
        assert grads.ndim == 4
        assert inputs is None or inputs.shape[:2] == (grads.shape[0], grads.shape[2])
        dtype = compute_dtype(grads) if inputs is None else compute_dtype(inputs, grads)
        self._parts: tuple[tuple[Tensor | None, Tensor], ...] = ((inputs, grads),)
        self._dtype = dtype
        self.ones = ones
        self.batch, self.objectives, _, self.out_features = grads.shape
        self.in_features = 0 if inputs is None else inputs.shape[2]
        self.num_rows = self.batch * self.objectives
        self.num_columns = self.out_features * (self.in_features + int(ones))
        self.device = grads.device

    @property
    def positions(self) -> int:
        """The number of positions t over which the outer products are summed."""
        return sum(grads.shape[2] for _, grads in self._parts)

    def factors(self) -> tuple[Tensor | None, Tensor]:
        """``a`` [b, t, in] (or None) and ``g`` [b, k, t, out] over all positions."""
        if len(self._parts) > 1:
            grads = torch.cat([g.to(self._dtype) for _, g in self._parts], dim=2)
            inputs = None
            if self.in_features:
                inputs = torch.cat([_present(a).to(self._dtype) for a, _ in self._parts], dim=1)
            self._parts = ((inputs, grads),)
        inputs, grads = self._parts[0]
        return None if inputs is None else inputs.to(self._dtype), grads.to(self._dtype)

    def shares_grads(self, other: OuterBlock) -> bool:
        """Whether both blocks come from the same gradients, as a weight and its bias do."""
        return len(self._parts) == len(other._parts) and all(
            mine is theirs for (_, mine), (_, theirs) in zip(self._parts, other._parts, strict=True)
        )

    def with_bias(self) -> OuterBlock:
        """This block with the columns of the bias appended."""
        assert self.in_features and not self.ones
        inputs, grads = self.factors()
        return OuterBlock(inputs, grads, ones=True)

    def cross(self, other: Self) -> Tensor:
        if _pairwise_is_cheaper(self, other):
            return self._cross_pairwise(other)
        result = torch.zeros(self.num_rows, other.num_rows, dtype=torch.float64, device=self.device)
        if other is self:
            for tile in self._tiles():
                result += tile @ tile.T
        else:
            for mine, theirs in zip(self._tiles(other), other._tiles(self), strict=True):
                result += mine @ theirs.T
        return result

    def _cross_pairwise(self, other: Self) -> Tensor:
        """(A A^T + 1 if bias) * (G G^T), summed over pairs of positions."""
        a1, g1 = self.factors()
        a2, g2 = other.factors()
        b1, k, t1, out = g1.shape
        b2, _, t2, _ = g2.shape
        result = torch.empty(b1, k, b2, k, dtype=torch.float64, device=self.device)
        step = max(1, _TILE // max(1, k * k * t1 * b2 * t2))
        for start in range(0, b1, step):
            rows = slice(start, min(b1, start + step))
            n = rows.stop - rows.start
            grads = g1[rows].reshape(-1, out) @ g2.reshape(-1, out).T
            products = grads.view(n, k, t1, b2, k, t2)
            if a1 is not None and a2 is not None:
                inputs = a1[rows].reshape(n * t1, -1) @ a2.reshape(b2 * t2, -1).T
                if self.ones:
                    inputs += 1
                products = products * inputs.view(n, 1, t1, b2, 1, t2)
            result[rows] = products.sum(dim=(2, 5)) if t1 * t2 != 1 else products[:, :, 0, ..., 0]
        return result.view(b1 * k, b2 * k)

    def _tiles(self, other: OuterBlock | None = None) -> Iterator[Tensor]:
        """The rows in tiles of output features: [m, width * (in + 1 if bias)]."""
        inputs, grads = self.factors()
        tallest = max(self.num_rows, other.num_rows if other is not None else 0, 1)
        per_output = tallest * (self.in_features + 1)
        width = min(self.out_features, max(1, _TILE // per_output))
        for start in range(0, self.out_features, width):
            tile = grads[..., start : start + width].transpose(2, 3)
            pieces = []
            if inputs is not None:
                pieces.append(torch.matmul(tile, inputs.unsqueeze(1)))  # [b, k, width, in]
            if self.ones:
                pieces.append(tile.sum(dim=3, keepdim=True))
            rows = torch.cat(pieces, dim=3) if len(pieces) > 1 else pieces[0]
            yield rows.reshape(self.num_rows, -1)

    def rows(self) -> Tensor:
        inputs, grads = self.factors()
        pieces = []
        if inputs is not None:
            weight = torch.matmul(grads.transpose(2, 3), inputs.unsqueeze(1))
            pieces.append(weight.reshape(self.num_rows, self.out_features * self.in_features))
        if self.ones:
            pieces.append(grads.sum(dim=2).reshape(self.num_rows, self.out_features))
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]

    def combine(self, weights: Tensor) -> Tensor:
        inputs, grads = self.factors()
        shaped = weights.to(self._dtype).view(self.batch, self.objectives)
        weighted = torch.einsum("bk,bkto->bto", shaped, grads)
        pieces = []
        if inputs is not None:
            flat = weighted.reshape(-1, self.out_features)
            pieces.append((flat.T @ inputs.reshape(-1, self.in_features)).reshape(-1))
        if self.ones:
            pieces.append(weighted.sum(dim=(0, 1)))
        return torch.cat(pieces)

    def add(self, other: JacobianBlock) -> JacobianBlock:
        alike = (
            isinstance(other, OuterBlock)
            and other.in_features == self.in_features
            and other.out_features == self.out_features
            and other.ones == self.ones
        )
        if not alike:
            return DenseBlock(self.rows() + other.rows())
        assert isinstance(other, OuterBlock)
        total = OuterBlock(*self._parts[0], ones=self.ones)
        total._parts = self._parts + other._parts
        total._dtype = torch.promote_types(self._dtype, other._dtype)
        return total


def sum_blocks(blocks: Sequence[JacobianBlock]) -> JacobianBlock:
    """The block of the sum of several Jacobians with respect to one parameter."""
    total = blocks[0]
    for block in blocks[1:]:
        total = total.add(block)
    return total


def pairwise_flops(b1: int, t1: int, b2: int, t2: int, k: int, in_: int, out: int) -> float:
    """Floating-point operations of the pairwise form between two sets of samples."""
    pairs = float(b1) * t1 * b2 * t2
    return 2.0 * pairs * (in_ + k * k * out) + 6.0 * pairs * k * k


def materialised_flops(b1: int, t1: int, b2: int, t2: int, k: int, in_: int, out: int) -> float:
    """Floating-point operations of forming the rows of both sets and multiplying them.

    The factor 2 on the product of the rows: it is skinny, and runs at about half the speed.
    """
    forming = 2.0 * k * (b1 * t1 + b2 * t2) * in_ * out
    return forming + 2.0 * 2.0 * (k * b1) * (k * b2) * in_ * out


def _pairwise_is_cheaper(one: OuterBlock, two: OuterBlock) -> bool:
    sizes = (one.batch, one.positions, two.batch, two.positions)
    dims = (one.objectives, max(one.in_features, 1), one.out_features)
    materialised = materialised_flops(*sizes, *dims)
    if one is two:
        materialised -= 2.0 * one.num_rows * one.positions * dims[1] * dims[2]
    return pairwise_flops(*sizes, *dims) <= materialised


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
