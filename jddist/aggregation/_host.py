"""Small loops over a Gramian run on numpy copies: many tiny torch calls would cost far more."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Indices: TypeAlias = npt.NDArray[np.integer[Any]]


def to_host(gramian: Tensor) -> Array:
    """A writable copy [m, m] on the CPU: float64 stays, all other dtypes become float32."""
    dtype = torch.float64 if gramian.dtype == torch.float64 else torch.float32
    return gramian.detach().to(device="cpu", dtype=dtype, copy=True).numpy()


def to_host_in_double(gramian: Tensor) -> Array:
    """The same numbers in float64, on the CPU. They may be the Gramian's own: not to be written."""
    return gramian.detach().to("cpu", torch.float64).numpy()


def from_host(weights: Array, gramian: Tensor) -> Tensor:
    """The weights [m] in the Gramian's dtype and on its device."""
    return torch.from_numpy(weights).to(gramian)


def from_double(weights: Array, gramian: Tensor) -> Tensor:
    """The same for weights in float64: those too large for the Gramian's dtype become its largest.

    So the weights of a finite Gramian are finite.
    """
    bound = torch.finfo(gramian.dtype).max
    return torch.from_numpy(np.minimum(np.maximum(weights, -bound), bound)).to(gramian)


def relative_rounding(gramian: Tensor) -> float:
    """Rounding error of the eigenvalues of a Gramian [m, m], relative to the greatest of them."""
    return gramian.shape[0] * torch.finfo(gramian.dtype).eps
