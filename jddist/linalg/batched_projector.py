"""Projection onto the dual cone for many vectors at once, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ._complementarity import Split, certificate, guess, polish, split_of, unit_diagonal
from ._dealing import current_dealer
from .dual_cone import (
    NOT_FINITE,
    NOT_POSITIVE_DEFINITE,
    QuadprogProjector,
    RegularizedProjector,
    Unsolvable,
    solve_one_by_one,
)

# Largest relative KKT residual of a solution that is handed out as it is.
_CERTIFIED = 1e-8
# Below this k m, the batched solver is bound by the number of operations and not by their size.
_LOW_PRECISION_FROM = 10_000
# k m³ from which all problems at once are faster than quadprog one by one, on CPUs.
_WORTHWHILE = 3e6


class BatchedProjector(RegularizedProjector):
    """Solves all the quadratic programs at once, on the device of the Gramian.

    An over-relaxed splitting method (ADMM, Boyd et al. 2011, section 3.4.3) finds nearly which
    constraints are active, and an active-set method corrects them and makes the solutions exact
    (block principal pivoting, Kim and Park 2011). Each solution is certified: its KKT residual
    (constraints, multipliers and complementarity, relative to |u| and |Gv|) is at most 1e-8, and
    mostly about 1e-13. What is not certified is solved by quadprog, and counted.

    Each problem is solved on G / trace(G) + reg_eps * I.

    Args:
        norm_eps: Trace of G below which it is replaced by zero, so that u is returned where it is
            not negative. Such calls are counted in `below_norm_eps`, and the first one of an
            instance warns (unless G is exactly zero). 0 turns this off.
        reg_eps: What is added to the diagonal, to make G positive definite.
        warm_start: Whether to start from the last call's solutions if the shapes are the same. This
            changes results by rounding alone (about 1e-12 at most of the largest weight for the
            default `reg_eps`; the more, the smaller that is), and keeps [k, m] numbers in memory.
        deal_from: The number of vectors from which, on several ranks, every rank solves its share
            of the problems and all solutions are gathered. None: rank 0 always solves them all.

    Attributes:
        below_norm_eps: Number of calls whose G had a positive trace below `norm_eps`.
        fallbacks: Number of problems that were solved by quadprog.
    """

    def __init__(
        self,
        *,
        norm_eps: float = 1e-4,
        reg_eps: float = 1e-4,
        warm_start: bool = True,
        deal_from: int | None = 1024,
    ) -> None:
        super().__init__(norm_eps=norm_eps, reg_eps=reg_eps)
        self.warm_start = warm_start
        self.deal_from = deal_from
        self.fallbacks = 0
        self._last: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(norm_eps={self.norm_eps}, reg_eps={self.reg_eps}, "
            f"warm_start={self.warm_start}, deal_from={self.deal_from})"
        )

    def deals(self, k: int, m: int) -> bool:
        return self.deal_from is not None and k >= self.deal_from

    @property
    def warm_start(self) -> bool:
        """Whether to start from the last call's solutions."""
        return self._warm_start

    @warm_start.setter
    def warm_start(self, value: bool) -> None:
        self._warm_start = value
        self._last = None

    def _solve(self, vectors: Tensor, gramian: Tensor) -> Tensor:
        dealer, (k, m) = current_dealer(), vectors.shape
        if dealer is None or not self.deals(k, m):
            return self._solve_here(vectors, gramian)
        mine = vectors[dealer.rows_of(dealer.share, k)]
        # The Gramian is everyone's; the vectors and parameters are each rank's own.
        problems = f"{self!r} ".encode() + vectors.cpu().numpy().tobytes()
        return dealer.collect(self._solve_here(mine, gramian), k, problems)

    def _solve_here(self, vectors: Tensor, gramian: Tensor) -> Tensor:
        scales = _powers_of_two(vectors)
        vectors = vectors / scales
        slopes = vectors @ gramian
        if not torch.isfinite(slopes).all():
            raise Unsolvable(NOT_FINITE)
        solutions = vectors.clone()
        # Where Gu >= 0 the constraints are all active and u solves its own problem.
        open_ = (slopes < 0.0).any(dim=1)
        if open_.any() and torch.linalg.cholesky_ex(gramian).info != 0:
            raise Unsolvable(NOT_POSITIVE_DEFINITE)
        split = split_of(gramian, self.reg_eps) if open_.any() else None
        start = None
        if self._last is not None and self._last.shape == vectors.shape:
            start = self._last.to(vectors.device)[open_]
        for dtype in _precisions(vectors.numel()):
            rows = open_.nonzero().squeeze(1)
            if rows.numel() == 0:
                break
            try:
                found, certified = _solve_together(gramian, vectors[rows], start, dtype, split)
            except torch.linalg.LinAlgError:  # by rounding: G is positive definite, if barely
                start = None
                continue
            solutions[rows[certified]] = found[certified]
            open_[rows] = ~certified
            start = None  # a solution that misled the first attempt would mislead the next
        self._fall_back(solutions, vectors, gramian, open_)
        # A start needs no precision.
        self._last = solutions.float() if self.warm_start else None
        return solutions * scales

    def _fall_back(
        self, solutions: Tensor, vectors: Tensor, gramian: Tensor, open_: Tensor
    ) -> None:
        count = int(open_.sum())
        if count:
            self.fallbacks += count
            exact = solve_one_by_one(gramian.cpu().numpy(), vectors[open_].cpu().numpy())
            solutions[open_] = torch.from_numpy(exact).to(solutions)

    def _device(self, U: Tensor, G: Tensor) -> torch.device:
        return _device_with_float64(G)


class AutomaticProjector(QuadprogProjector):
    """A `QuadprogProjector` that hands many or large problems to a `BatchedProjector`.

    Args:
        norm_eps: See `QuadprogProjector`.
        reg_eps: See `QuadprogProjector`.

    Attributes:
        below_norm_eps: Number of calls whose G had a positive trace below `norm_eps`.
    """

    def __init__(self, *, norm_eps: float = 1e-4, reg_eps: float = 1e-4) -> None:
        super().__init__(norm_eps=norm_eps, reg_eps=reg_eps)
        self._batched = BatchedProjector()

    @property
    def fallbacks(self) -> int:
        """Number of problems that the batched solver left to quadprog."""
        return self._batched.fallbacks

    def deals(self, k: int, m: int) -> bool:
        return _is_worthwhile(k, m) and self._batched.deals(k, m)

    def _solve(self, vectors: Tensor, gramian: Tensor) -> Tensor:
        if _is_worthwhile(vectors.shape[0], gramian.shape[0]):
            self._batched.norm_eps, self._batched.reg_eps = self.norm_eps, self.reg_eps
            return self._batched._solve(vectors, gramian)
        return super()._solve(vectors, gramian)

    def _device(self, U: Tensor, G: Tensor) -> torch.device:
        m = G.shape[0]
        worthwhile = _is_worthwhile(U.numel() // m, m)
        return _device_with_float64(G) if worthwhile else super()._device(U, G)


def _is_worthwhile(k: int, m: int) -> bool:
    return k * m**3 >= _WORTHWHILE


def _solve_together(
    gramian: Tensor,
    vectors: Tensor,
    start: Tensor | None,
    dtype: torch.dtype,
    split: Split | None,
) -> tuple[Tensor, Tensor]:
    """Solutions [k, m], and which of them are certified [k]."""
    matrix, scale = unit_diagonal(gramian)
    lower = vectors.T / scale
    free, near = guess(matrix, lower, dtype, None if start is None else start.T / scale)
    if split is not None:
        split = split[0] * scale, split[1] * scale.square()
    solution, done = polish(matrix, lower, free, near, dtype, split)
    solution = torch.maximum(solution * scale, vectors.T)
    certified = done & (certificate(gramian, vectors.T, solution) <= _CERTIFIED)
    return solution.T, certified


def _powers_of_two(vectors: Tensor) -> Tensor:
    """About the size of each vector [k, m], of shape [k, 1].

    The problems are homogeneous: divided by it, no vector over- or underflows. Dividing by a power
    of two rounds nothing.
    """
    exponents = torch.frexp(vectors.abs().amax(dim=1, keepdim=True)).exponent.clamp(-1000, 1000)
    return 2.0 ** exponents.to(vectors)


def _precisions(size: int) -> tuple[torch.dtype, ...]:
    """What to iterate in; float64 serves Gramians that are too ill-conditioned for float32."""
    return (torch.float32, torch.float64) if size >= _LOW_PRECISION_FROM else (torch.float64,)


def _device_with_float64(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device
