"""The input of methods that compare the gradients of two batches."""

from __future__ import annotations

from torch import Tensor


def check_two_batches(matrix: Tensor, method: object) -> int:
    """m of a matrix J1 J2^T; raises ValueError unless its shape is [m, m]."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"{type(method).__name__} expects the products J1 J2^T of the gradients of two "
            f"batches, of shape [m, m]. Found shape {tuple(matrix.shape)}: compute them with "
            "Engine.cross_gramian, or from two Jacobians as J1 @ J2.T."
        )
    return matrix.shape[0]
