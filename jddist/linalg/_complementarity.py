"""Many quadratic programs min vᵀGv subject to v >= u that share one G, solved together.

The problems are the columns of U [m, k]. Each is a linear complementarity problem: v >= u, y = Gv
>= 0, and one of the two is tight in every coordinate. The coordinates with y = 0 are free, the
others active (v = u), and once the free ones are known v solves a linear system. `guess` finds them
nearly, by a splitting method in low precision; `polish` makes the solution exact.

Both expect G with a unit diagonal (`unit_diagonal`), which takes badly scaled rows away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_RELAXATION = 1.8
_CHECK_EVERY = 5
_MAX_ITERATIONS = 200
_REBALANCED_AT = (5, 10, 20, 40, 80, 160)
# A guess with fewer wrong coordinates than this per problem is cheaper to polish than to improve.
_CHANGES_PER_PROBLEM = 0.5
_MAX_ROUNDS = 15
_CG_TOLERANCE = 1e-5
_CG_CHECK_EVERY = 3
_CG_MAX_ITERATIONS = 150
# How many outer products may make up G, but for its diagonal.
_LOW_RANK = 16

# L [m, r] and e [m, 1]: G is nearly L Lᵀ + diag(e).
Split = tuple[Tensor, Tensor]


def certificate(gramian: Tensor, lower: Tensor, solution: Tensor) -> Tensor:
    """How far from optimal each solution is: the largest relative KKT residual.

    Args:
        gramian: G, of shape [m, m].
        lower: U, of shape [m, k].
        solution: V, of shape [m, k].

    Returns:
        For each problem the largest of max(U - V, 0) / |U|, max(-GV, 0) / |GV| and
        |min(V - U, GV)| / |GV|, in maximum norms, of shape [k].
    """
    tiny = torch.finfo(gramian.dtype).tiny
    slopes = gramian @ solution
    slope_scale = slopes.abs().amax(dim=0).clamp_min(tiny)
    lower_scale = lower.abs().amax(dim=0).clamp_min(tiny)
    below = (lower - solution).clamp_min(0.0).amax(dim=0) / lower_scale
    # min(V - U, GV) is at most -max(-GV, 0) where GV is negative: it covers the second term.
    gap = torch.minimum(solution - lower, slopes).abs().amax(dim=0) / slope_scale
    return torch.maximum(below, gap)


def unit_diagonal(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """Returns D G D with a unit diagonal, and the diagonal [m, 1] of D.

    If v solves the problem of G and u, then D⁻¹v solves that of D G D and D⁻¹u.
    """
    scale = gramian.diagonal().rsqrt()[:, None]
    return scale * gramian * scale.T, scale


def split_of(gramian: Tensor, shift: float) -> Split | None:
    """L and e with G near L Lᵀ + diag(e), if G is nearly of low rank but for its diagonal.

    By a Cholesky decomposition with pivots, of at most 16 columns. What it leaves has a trace, and
    so eigenvalues, of at most ``shift``: G is between one and two times what is returned.

    Args:
        gramian: G, of shape [m, m], positive semi-definite without ``shift``.
        shift: What was added to the diagonal.
    """
    rest = gramian.diagonal() - shift
    factor = gramian[:, :0]
    if float(rest.sum()) <= shift:
        return None
    while float(rest.sum()) > shift:
        if factor.shape[1] == _LOW_RANK:
            return None
        pivot = int(rest.argmax())
        column = gramian[:, pivot] - factor @ factor[pivot]
        column[pivot] -= shift
        column = column / rest[pivot].sqrt()
        factor = torch.cat([factor, column[:, None]], dim=1)
        rest = (rest - column.square()).clamp_min(0.0)
    return factor, torch.full_like(gramian[:, :1], shift)


def guess(
    gramian: Tensor, lower: Tensor, dtype: torch.dtype, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Finds most of the free coordinates, by over-relaxed ADMM on v = z, z >= u.

    The penalty starts at the geometric mean of G's eigenvalues, which suits the bulk of the
    spectrum where the extreme ones may be outliers, and follows the ratio of the residuals.

    Args:
        gramian: G with a unit diagonal, positive definite, of shape [m, m].
        lower: U, of shape [m, k].
        dtype: The precision to iterate in.
        start: A solution of similar problems, of shape [m, k].

    Returns:
        Which coordinates seem free, and about where the solutions are, both of shape [m, k].
    """
    factor = torch.linalg.cholesky(gramian)
    penalty = (2.0 * factor.diagonal().log().mean()).exp()
    kernel = _kernel(gramian, penalty, dtype)
    bound = lower.to(dtype)
    z, slopes = _begin(gramian.to(dtype), bound, start)
    dual = slopes.clamp_max_(0.0) / penalty.to(dtype)
    free = dual >= 0.0
    v, argument, moved = torch.empty_like(z), torch.empty_like(z), torch.empty_like(z)
    for iteration in range(1, _MAX_ITERATIONS + 1):
        torch.sub(z, dual, out=argument)
        torch.mm(kernel, argument, out=v)
        torch.lerp(z, v, _RELAXATION, out=argument)
        argument += dual
        torch.maximum(argument, bound, out=moved)
        torch.sub(argument, moved, out=dual)
        if iteration % _CHECK_EVERY == 0:
            previous, free = free, dual >= 0.0
            changes = (previous != free).sum()
            if bool(changes <= _CHANGES_PER_PROBLEM * bound.shape[1]):
                return free, moved
            if iteration in _REBALANCED_AT:
                factor_of_penalty = _rebalance(v, z, moved, dual)
                if not 2 / 3 <= factor_of_penalty <= 1.5:
                    penalty = penalty * factor_of_penalty
                    dual /= factor_of_penalty
                    kernel = _kernel(gramian, penalty, dtype)
        z, moved = moved, z
    return free, z


def _begin(gramian: Tensor, bound: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where to begin, and minus the slopes there (zero where the start says nothing)."""
    cold = bound.clamp_min(0.0)
    if start is None:
        return cold, torch.zeros_like(cold)
    warm = torch.maximum(start.to(bound), bound)
    slopes = gramian @ warm
    gap = torch.minimum(warm - bound, slopes).abs().sum(dim=0)
    cold_gap = torch.minimum(cold - bound, gramian @ cold).abs().sum(dim=0)
    helps = gap < 0.5 * cold_gap  # the solutions of an unrelated step would lead astray
    return torch.where(helps, warm, cold), torch.where(helps, -slopes, 0.0)


def _kernel(gramian: Tensor, penalty: Tensor, dtype: torch.dtype) -> Tensor:
    """ρ (G + ρI)⁻¹."""
    shifted = gramian.clone()
    shifted.diagonal().add_(penalty)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
    return (penalty * inverse).to(dtype)


def _rebalance(v: Tensor, z: Tensor, moved: Tensor, dual: Tensor) -> float:
    """By how much to change the penalty for primal and dual residuals to be of one size."""
    tiny = torch.finfo(v.dtype).tiny
    primal = (v - moved).norm() / moved.norm().clamp_min(tiny)
    change = (moved - z).norm() / dual.norm().clamp_min(tiny)
    return float((primal / change.clamp_min(tiny)).sqrt().clamp(0.2, 5.0))


def polish(
    gramian: Tensor,
    lower: Tensor,
    free: Tensor,
    start: Tensor,
    dtype: torch.dtype,
    split: Split | None = None,
) -> tuple[Tensor, Tensor]:
    """Corrects the free coordinates until they are right, and solves for them exactly.

    Every round solves for all problems that are not done, by conjugate gradients in low precision
    with the residual in G's own, and exchanges the coordinates that turn out to be on the wrong
    side (block principal pivoting).

    Args:
        gramian: G with a unit diagonal, of shape [m, m].
        lower: U, of shape [m, k].
        free: Which coordinates are free, as far as known, of shape [m, k].
        start: About where the solutions are, of shape [m, k].
        dtype: The precision of the conjugate gradients.
        split: What is known of G's structure, which makes them few.

    Returns:
        The solutions [m, k], and which of them are exact to rounding [k]. The others are to be
        solved otherwise.
    """
    narrow = gramian.to(dtype)
    solution = torch.maximum(start.to(lower), lower)
    done = torch.zeros(lower.shape[1], dtype=torch.bool, device=lower.device)
    columns = torch.arange(lower.shape[1], device=lower.device)
    v = torch.where(free, solution, lower)
    slopes = gramian @ v
    for _ in range(_MAX_ROUNDS):
        v = v + _solve(narrow, torch.where(free, -slopes, 0.0), free, split)
        slopes = gramian @ v
        # What rounding leaves in slopes, whose terms are at most |v|: |G_ij| <= 1.
        noise = 8.0 * torch.finfo(v.dtype).eps * v.abs().sum(dim=0)
        wrong = torch.where(free, v < lower - noise, slopes < -noise)
        residual = torch.where(free, slopes, 0.0).abs().amax(dim=0)
        finished = ~wrong.any(dim=0) & (residual <= noise)
        solution[:, columns] = torch.maximum(v, lower)
        done[columns] = finished
        open_ = (~finished).nonzero().squeeze(1)
        if open_.numel() == 0:
            break
        columns, lower, free = columns[open_], lower[:, open_], free[:, open_] ^ wrong[:, open_]
        kept = torch.where(free, v[:, open_], lower)
        # Where nothing changed sides, the slopes are at hand.
        slopes = gramian @ kept if bool(wrong.any()) else slopes[:, open_]
        v = kept
    return solution, done


def _preconditioner(split: Split, free: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The inverse of L Lᵀ + diag(e) in the free coordinates of each column (Woodbury)."""
    factor, diagonal = split
    (m, rank), k = factor.shape, free.shape[1]
    products = (factor[:, :, None] * factor[:, None, :] / diagonal[:, :, None]).reshape(m, -1)
    inner = (free.T.to(factor.dtype) @ products).view(k, rank, rank)
    inner.diagonal(dim1=1, dim2=2).add_(1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inner)).to(dtype)
    scaled, inverted = (factor / diagonal).to(dtype), diagonal.reciprocal().to(dtype)
    mask = free.to(dtype)

    def apply(x: Tensor) -> Tensor:
        parts = torch.einsum("krs,sk->rk", inverse, scaled.T @ x)
        return (x * inverted - scaled @ parts) * mask

    return apply


def _solve(gramian: Tensor, right: Tensor, free: Tensor, split: Split | None = None) -> Tensor:
    """Nearly solves G x = right in the free coordinates of each column; x is zero elsewhere."""
    tiny = torch.finfo(gramian.dtype).tiny
    scale = right.abs().amax(dim=0).clamp_min(torch.finfo(right.dtype).tiny)
    mask = free.to(gramian.dtype)
    residual = (right / scale).to(gramian.dtype)
    precondition = None if split is None else _preconditioner(split, free, gramian.dtype)
    direction = residual.clone() if precondition is None else precondition(residual)
    x = torch.zeros_like(residual)
    image, product = torch.empty_like(residual), torch.empty_like(residual)
    limit = _CG_TOLERANCE**2 * torch.mul(residual, residual, out=product).sum(dim=0)
    square = torch.mul(residual, direction, out=product).sum(dim=0)
    for iteration in range(1, _CG_MAX_ITERATIONS + 1):
        torch.mm(gramian, direction, out=image)
        image *= mask
        curvature = torch.mul(direction, image, out=product).sum(dim=0)
        step = square / curvature.clamp_min(tiny)
        x.addcmul_(direction, step.expand_as(x))
        residual.addcmul_(image, step.expand_as(x), value=-1.0)
        size = torch.mul(residual, residual, out=product).sum(dim=0)
        if iteration % _CG_CHECK_EVERY == 0 and bool((size <= limit).all()):
            break
        towards = residual if precondition is None else precondition(residual)
        previous, square = square, size
        if precondition is not None:
            square = torch.mul(residual, towards, out=product).sum(dim=0)
        direction *= square / previous.clamp_min(tiny)
        direction += towards
    return x.to(right) * scale
