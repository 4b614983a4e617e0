"""Projection onto the dual cone of a Jacobian's rows, as a quadratic program in its Gramian."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import quadprog
import torch
from torch import Tensor

from jddist._checked import Checked

from .matrix import PSDMatrix, is_psd_matrix

NOT_FINITE = "the Gramian or the vectors hold NaN or infinite values"
NOT_POSITIVE_DEFINITE = "the regularized Gramian is not positive definite"

_Array: TypeAlias = npt.NDArray[np.float64]


class Unsolvable(ValueError):
    """Why a projector cannot solve its problems; its caller sees a ValueError that says more."""


class DualConeProjector(ABC):
    """Projects combinations of the rows of J onto their dual cone {x : J x >= 0}.

    For each vector u it gives the w such that wᵀJ is the projection of uᵀJ. That w minimizes vᵀGv
    subject to v >= u, where G = J Jᵀ (Proposition 1 of "Jacobian Descent For Multi-Objective
    Optimization", arXiv:2406.16232).
    """

    @abstractmethod
    def __call__(self, U: Tensor, G: PSDMatrix) -> Tensor:
        """Solves one problem for each vector of U.

        Args:
            U: Vectors of shape [..., m].
            G: Gramian of shape [m, m].

        Returns:
            Weights of the shape of U, in the dtype and on the device of G.

        Raises:
            ValueError: U and G disagree about m, or a problem could not be solved.
        """

    def deals(self, k: int, m: int) -> bool:
        """Whether k problems of m objectives are dealt out over ranks, where there are several."""
        return False


def check_shapes(U: Tensor, G: Tensor) -> None:
    """Raises a ValueError unless G is [m, m] and U is [..., m]."""
    if not is_psd_matrix(G):
        raise ValueError(f"G must be a Gramian of shape [m, m]. Found shape {tuple(G.shape)}.")
    if U.ndim == 0 or U.shape[-1] != G.shape[0]:
        raise ValueError(
            f"The last dimension of U must be the number of objectives m = {G.shape[0]} of the "
            f"Gramian. Found U of shape {tuple(U.shape)}: give one weight per objective."
        )


class RegularizedProjector(DualConeProjector):
    """Base class of the projectors that solve on G / trace(G) + reg_eps * I, in float64.

    Args:
        norm_eps: Trace of G below which it is replaced by zero, so that u is returned where it is
            not negative. Such calls are counted in `below_norm_eps`, and the first one of an
            instance warns (unless G is exactly zero). 0 turns this off.
        reg_eps: What is added to the diagonal, to make G positive definite.

    Attributes:
        below_norm_eps: Number of calls whose G had a positive trace below `norm_eps`.
    """

    norm_eps = Checked[float](lambda value: value >= 0.0, "non-negative")
    reg_eps = Checked[float](lambda value: value >= 0.0, "non-negative")

    def __init__(self, *, norm_eps: float = 1e-4, reg_eps: float = 1e-4) -> None:
        self.norm_eps = norm_eps
        self.reg_eps = reg_eps
        self.below_norm_eps = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(norm_eps={self.norm_eps}, reg_eps={self.reg_eps})"

    def __call__(self, U: Tensor, G: PSDMatrix) -> Tensor:
        check_shapes(U, G)
        m = G.shape[0]
        if U.numel() == 0:
            return U.detach().to(G).clone()
        matrix = G.detach().to(device=self._device(U, G), dtype=torch.float64)
        trace = matrix.trace().item()
        self._watch(trace)
        # `normalize` and `regularize`, in fewer operations.
        vanishing = trace < self.norm_eps or trace == 0.0
        matrix = torch.zeros_like(matrix) if vanishing else matrix / trace
        matrix.diagonal().add_(self.reg_eps)
        vectors = U.detach().to(matrix).reshape(-1, m)
        try:
            solutions = self._solve(vectors, matrix)
        except Unsolvable as error:
            raise ValueError(
                f"{type(self).__name__} could not project onto the dual cone of {m} objectives, "
                f"whose Gramian has the trace {trace:.6g}: {error}. If the Gramian is finite, give "
                f"the projector a larger reg_eps than {self.reg_eps} "
                f"({type(self).__name__}(reg_eps=...))."
            ) from error
        return solutions.reshape(U.shape).to(G)

    @abstractmethod
    def _solve(self, vectors: Tensor, gramian: Tensor) -> Tensor:
        """Minimizes vᵀGv subject to v >= u for each row u of `vectors` [k, m].

        Args:
            vectors: The vectors u, in float64.
            gramian: G [m, m] normalized and regularized, in float64.

        Raises:
            Unsolvable: Something is not finite, or G is not positive definite.
        """

    def _device(self, U: Tensor, G: Tensor) -> torch.device:
        """Where to solve."""
        return torch.device("cpu")

    def _watch(self, trace: float) -> None:
        if not 0.0 < trace < self.norm_eps:
            return
        self.below_norm_eps += 1
        if self.below_norm_eps == 1:
            warnings.warn(
                f"The Gramian's trace {trace:.3g} is below norm_eps={self.norm_eps:.3g}, so the "
                "weights ignore conflicts from here on (as happens near convergence). Use "
                f"{type(self).__name__}(norm_eps=0) to keep resolving them. This is said once.",
                UserWarning,
                stacklevel=3,
            )


class QuadprogProjector(RegularizedProjector):
    """Solves the quadratic programs one by one with quadprog, on the CPU in float64.

    Each problem is solved on G / trace(G) + reg_eps * I.

    Args:
        norm_eps: Trace of G below which it is replaced by zero, so that u is returned where it is
            not negative. Such calls are counted in `below_norm_eps`, and the first one of an
            instance warns (unless G is exactly zero). 0 turns this off.
        reg_eps: What is added to the diagonal, since quadprog needs G to be positive definite.

    Attributes:
        below_norm_eps: Number of calls whose G had a positive trace below `norm_eps`.
    """

    def _solve(self, vectors: Tensor, gramian: Tensor) -> Tensor:
        return torch.from_numpy(solve_one_by_one(gramian.numpy(), vectors.numpy()))


def solve_one_by_one(gramian: _Array, vectors: _Array) -> _Array:
    """Minimizes vᵀGv subject to v >= u for each row u of `vectors` [k, m].

    Raises:
        Unsolvable: Something is not finite, or G is not positive definite.
    """
    # quadprog takes violations below some absolute size for none, so all vectors get the size 1.
    exponents = np.frexp(np.abs(vectors).max(axis=1, keepdims=True))[1]
    vectors = np.ldexp(vectors, -exponents)
    slopes = vectors @ gramian
    if not np.isfinite(slopes).all():
        raise Unsolvable(NOT_FINITE)
    linear, constraints = np.zeros(len(gramian)), np.eye(len(gramian))
    solutions = vectors.copy()
    # Where Gu >= 0 the constraints are all active and u solves its own problem.
    open_ = np.flatnonzero((slopes < 0.0).any(axis=1))
    factored = len(open_) > 1  # quadprog factors G itself, which for one problem is quickest
    matrix = _inverse_root(gramian) if factored else gramian
    for k in open_:
        try:
            found = quadprog.solve_qp(matrix, linear, constraints, vectors[k], 0, factored)
        except ValueError as error:
            raise Unsolvable(f"{NOT_POSITIVE_DEFINITE} ({error})") from error
        solutions[k] = found[0]
    return np.ldexp(solutions, exponents)


def _inverse_root(gramian: _Array) -> _Array:
    """R⁻¹ where G = RᵀR with R upper triangular, as quadprog wants it."""
    try:
        factor = np.linalg.cholesky(gramian)
    except np.linalg.LinAlgError:
        raise Unsolvable(NOT_POSITIVE_DEFINITE) from None
    return np.ascontiguousarray(np.linalg.inv(factor).T)
