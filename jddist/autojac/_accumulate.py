"""Writing ``.jac`` and ``.grad``: added to what is there, checked as torch checks ``.grad``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from jddist.distribution.base import Distribution
from jddist.distribution.whole import shape_of


def check_expects_gradients(tensors: Iterable[Tensor], field: str) -> None:
    """Raises ValueError unless torch itself would fill the tensors' ``.grad``."""
    for tensor in tensors:
        if not (tensor.requires_grad and (tensor.is_leaf or tensor.retains_grad)):
            raise ValueError(
                f"Found a tensor of shape {tuple(tensor.shape)} with requires_grad="
                f"{tensor.requires_grad} and is_leaf={tensor.is_leaf}; expected one whose {field} "
                "can be filled: a leaf that requires a gradient, or one that retains it."
            )


def jac_of(tensor: Tensor) -> Tensor | None:
    """The ``.jac`` [m, *shape] of a tensor, or None."""
    jac: Tensor | None = getattr(tensor, "jac", None)
    return jac


def add_jacs(tensors: Sequence[Tensor], jacs: Sequence[Tensor]) -> None:
    """Adds rows [m, *shape] to each tensor's ``.jac``."""
    check_expects_gradients(tensors, ".jac")
    for tensor, rows in zip(tensors, jacs, strict=True):
        if rows.shape[1:] != shape_of(tensor):
            raise RuntimeError(
                f"Found rows of shape {tuple(rows.shape)} for a tensor of shape "
                f"{tuple(shape_of(tensor))}; expected one row of the tensor's shape per objective."
            )
        holder: Any = tensor
        if jac_of(tensor) is None:
            holder.jac = rows
        else:
            holder.jac += rows


def add_grads(
    tensors: Sequence[Tensor], grads: Sequence[Tensor], distribution: Distribution
) -> None:
    """Adds a gradient to each tensor's ``.grad``, or to what the wrapper's next step uses."""
    check_expects_gradients(tensors, ".grad")
    for tensor, grad in zip(tensors, grads, strict=True):
        if distribution.keeps_gradient(tensor):
            distribution.keep_gradient(tensor, grad)
        elif tensor.grad is None:
            tensor.grad = grad
        else:
            tensor.grad += grad


def free_jacs(tensors: Iterable[Tensor]) -> None:
    """Deletes the tensors' ``.jac``."""
    for tensor in tensors:
        if jac_of(tensor) is not None:
            del tensor.jac  # type: ignore[attr-defined]
