"""Names for tensors of a known structure, for type checkers only, and their shape checks."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor


class Matrix(Tensor):
    """A tensor with two dimensions, such as a Jacobian [m, n]. Never instantiated."""


class PSDTensor(Tensor):
    """A generalized Gramian [m1, ..., mk, mk, ..., m1]. Never instantiated.

    Its second half runs in reverse, and flattened to [m, m] it is positive semi-definite.
    """


class PSDMatrix(PSDTensor, Matrix):
    """A positive semi-definite matrix, such as a Gramian [m, m]. Never instantiated."""


def is_matrix(tensor: Tensor) -> TypeGuard[Matrix]:
    """Whether the tensor has two dimensions."""
    return tensor.ndim == 2


def is_psd_tensor(tensor: Tensor) -> TypeGuard[PSDTensor]:
    """Whether the shape is that of a generalized Gramian (the values are not looked at)."""
    half = tensor.ndim // 2
    return tensor.ndim % 2 == 0 and tensor.shape[:half] == tensor.shape[half:][::-1]


def is_psd_matrix(tensor: Tensor) -> TypeGuard[PSDMatrix]:
    """Whether the shape is that of a Gramian [m, m] (the values are not looked at)."""
    return tensor.ndim == 2 and is_psd_tensor(tensor)
