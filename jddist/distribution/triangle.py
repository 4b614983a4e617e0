"""Lower triangles of symmetric matrices as vectors without gaps, by copies of rectangles.

The columns of the left half fill a rectangle below its diagonal; the rest, transposed, fills what
is left above it. Gathering the elements one by one would cost several times as much.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_lower(matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """The lower triangle of a matrix [m, m] as a vector [m (m + 1) / 2], in an order of its own.

    Args:
        matrix: The matrix.
        out: Where to put the vector.
    """
    m = len(matrix)
    half, below, beside = _folds(m)
    out = matrix.new_empty(m * (m + 1) // 2) if out is None else out
    packed = out.view(m + below, half)
    packed[:below] = 0
    torch.tril(matrix[:, :half], out=packed[below:])
    packed[: m - half, beside:] += _turned(matrix[half:, half:]).triu_()
    return out


def unpack_symmetric(vector: Tensor, m: int) -> Tensor:
    """The symmetric matrix [m, m] whose lower triangle ``pack_lower`` made a vector of."""
    half, below, beside = _folds(m)
    packed = vector.reshape(m + below, half)
    left, right = packed[below:], packed[: m - half, beside:]
    matrix = vector.new_empty(m, m)
    matrix[:half, :half] = lower = left[:half].tril()
    matrix[:half, :half] += _turned(lower.tril_(-1))
    matrix[half:, half:] = upper = right.triu()
    matrix[half:, half:] += _turned(upper.triu_(1))
    matrix[half:, :half] = left[half:]
    matrix[:half, half:] = _turned(left[half:])
    return matrix


def _turned(matrix: Tensor) -> Tensor:
    """The transpose, copied: faster than what reads across lines while it computes."""
    return matrix.contiguous().T.contiguous()


def _folds(m: int) -> tuple[int, int, int]:
    """The width of the rectangle; by how much its two parts are moved apart, down or aside."""
    return (m + 1) // 2, (m + 1) % 2, m % 2
