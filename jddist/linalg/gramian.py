"""Gramians: how they are computed, reshaped, normalized and made positive definite.

A Jacobian may have several leading dimensions: J of shape [m1, m2, n] has the generalized Gramian
G of shape [m1, m2, m2, m1] with G[i, j, k, l] = <J[i, j], J[l, k]>. The second half of the
dimensions runs in reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, cast, overload

import torch
from torch import Tensor

from .matrix import Matrix, PSDMatrix, PSDTensor, is_psd_tensor

# How many columns of half precision are worked on at a time.
_CHUNK = 1 << 16


@overload
def compute_gramian(tensor: Tensor, contracted_dims: Literal[-1] = -1) -> PSDMatrix: ...


@overload
def compute_gramian(tensor: Matrix, contracted_dims: Literal[1]) -> PSDMatrix: ...


@overload
def compute_gramian(tensor: Tensor, contracted_dims: int) -> PSDTensor: ...


def compute_gramian(tensor: Tensor, contracted_dims: int = -1) -> PSDTensor:
    """Computes the (generalized) Gramian of a (generalized) Jacobian.

    Args:
        tensor: Jacobian of shape [m1, ..., mk, *contracted].
        contracted_dims: How many trailing dimensions to sum over. A negative number says how many
            leading dimensions to keep instead: -1, the default, keeps the first alone.

    Returns:
        Tensor of shape [m1, ..., mk, mk, ..., m1], in float32 at least: rounded to 8 or 11 bits, a
        Gramian is indefinite, and in float16 it overflows.

    Raises:
        ValueError: The tensor has fewer dimensions than are to be contracted or kept.
    """
    kept = tensor.ndim - contracted_dims if contracted_dims >= 0 else -contracted_dims
    if not 0 <= kept <= tensor.ndim:
        raise ValueError(
            f"compute_gramian got a tensor of shape {tuple(tensor.shape)} with "
            f"contracted_dims={contracted_dims}, which speaks of more dimensions than there are. "
            f"Give a number from {-tensor.ndim} to {tensor.ndim}."
        )
    half_shape = tensor.shape[:kept]
    rows = tensor.reshape(prod(half_shape), prod(tensor.shape[kept:]))
    return unflatten_gramian(cast(PSDMatrix, _square(rows)), half_shape)


def _square(rows: Tensor) -> Tensor:
    if rows.dtype not in (torch.float16, torch.bfloat16):
        return rows @ rows.T
    gramian = rows.new_zeros(len(rows), len(rows), dtype=torch.float32)
    for columns in rows.split(_CHUNK, dim=1):  # never all of them in float32
        wide = columns.float()
        gramian = gramian + wide @ wide.T
    return gramian


def flatten_gramian(gramian: Tensor) -> PSDMatrix:
    """Reshapes a generalized Gramian [m1, ..., mk, mk, ..., m1] to [m, m], m = m1 * ... * mk.

    Rows and columns of the result are both in the order of the flattened output [m1, ..., mk].

    Raises:
        ValueError: The shape is not that of a generalized Gramian.
    """
    if not is_psd_tensor(gramian):
        raise ValueError(
            f"A generalized Gramian has a shape [m1, ..., mk, mk, ..., m1], whose second half is "
            f"the first in reverse. Found shape {tuple(gramian.shape)}."
        )
    m = prod(gramian.shape[: gramian.ndim // 2])
    return cast(PSDMatrix, _reverse_second_half(gramian).reshape(m, m))


def unflatten_gramian(gramian: Tensor, half_shape: Sequence[int]) -> PSDTensor:
    """Reshapes a Gramian [m, m] to [m1, ..., mk, mk, ..., m1]; undoes `flatten_gramian`.

    Args:
        gramian: Tensor of shape [m, m].
        half_shape: The shape [m1, ..., mk] of the differentiated output, with product m.
    """
    return cast(PSDTensor, _reverse_second_half(gramian.reshape((*half_shape, *half_shape))))


def _reverse_second_half(tensor: Tensor) -> Tensor:
    if tensor.ndim <= 2:
        return tensor
    half = tensor.ndim // 2
    return tensor.permute(*range(half), *range(tensor.ndim - 1, half - 1, -1))


def normalize(gramian: PSDMatrix, eps: float) -> PSDMatrix:
    """Divides a Gramian [m, m] by its trace, the squared Frobenius norm of the Jacobian.

    When the trace is below `eps` (or exactly 0) the result is zero. No value is read on the host.
    """
    trace = gramian.diagonal().sum()
    vanishing = (trace < eps) | (trace == 0)
    return cast(PSDMatrix, torch.where(vanishing, torch.zeros_like(gramian), gramian / trace))


def regularize(gramian: PSDMatrix, eps: float) -> PSDMatrix:
    """Adds `eps` to the diagonal of a Gramian [m, m], against eigenvalues rounded below zero."""
    identity = torch.eye(gramian.shape[0], dtype=gramian.dtype, device=gramian.device)
    return cast(PSDMatrix, gramian + eps * identity)
