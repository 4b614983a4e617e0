"""What the papers demand of each method's result, as errors computed in float64 from the Jacobian.

They are independent of how the package solves the problems: singular value decompositions of J,
optimality conditions, brute force.
"""

from __future__ import annotations

from collections.abc import Callable

import quadprog
import torch
from torch import Tensor

from tests.unit.aggregation._parity import Call

Condition = Callable[[Call], float]


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


def _nearest(call: Call, candidates: list[Tensor]) -> float:
    """The distance of the vector to the nearest candidate.

    Where the numerical rank of J is ambiguous, each rank has its own solution; which of them is
    taken is a matter of rounding.
    """
    return min(_relative(call.vector.double(), candidate) for candidate in candidates)


def _units(matrix: Tensor) -> Tensor:
    return torch.nan_to_num(matrix / matrix.norm(dim=1, keepdim=True), 0.0)


def aligned(scale: Callable[[Tensor], Tensor]) -> Condition:
    """AlignedMTL: the mean of rows whose singular values were all set to sqrt(scale)."""

    def error(call: Call) -> float:
        U, S, Vh = torch.linalg.svd(call.matrix, full_matrices=False)
        mean = torch.full_like(S, 1.0 / len(call.matrix))
        candidates = [call.matrix.mean(dim=0)]
        for rank in range(1, len(S) + 1):
            components = U[:, :rank].T @ mean.new_full([len(U)], 1.0 / len(U))
            candidates.append(scale(S[:rank] ** 2).sqrt() * components @ Vh[:rank])
        return _nearest(call, candidates)

    return error


def equal_projections(call: Call) -> float:
    """IMTLG: weights of sum 1 with G w as near to equal projections as the rank allows."""
    U, S, _ = torch.linalg.svd(call.matrix, full_matrices=False)
    candidates = [torch.zeros_like(call.vector, dtype=torch.float64)]
    for rank in range(1, len(S) + 1):
        components = U[:, :rank].T @ call.matrix.norm(dim=1)
        weights = U[:, :rank] @ (components / S[:rank] ** 2)
        candidates.append(weights / weights.sum() @ call.matrix)
    return _nearest(call, [c for c in candidates if c.isfinite().all()])


def equal_angles(preference: Tensor | None) -> Condition:
    """ConFIG: the sum of projections on a direction whose cosines are the preference."""

    def error(call: Call) -> float:
        units = _units(call.matrix)
        cosines = torch.ones(len(units)).double() if preference is None else preference.double()
        U, S, Vh = torch.linalg.svd(units, full_matrices=False)
        candidates = [] if S[0] > 0.0 else [torch.zeros_like(Vh[0])]
        for rank in range(1, int((S > 0.0).sum()) + 1):
            components = U[:, :rank].T @ cosines
            # No direction if the preference is orthogonal to all that the rows can reach.
            if components.norm() <= torch.finfo(call.dtype).eps * len(U) * cosines.norm():
                candidates.append(torch.zeros_like(Vh[0]))
                continue
            direction = (components / S[:rank]) @ Vh[:rank]
            direction = direction / direction.norm()
            candidates.append((call.matrix @ direction).sum() * direction)
        return _nearest(call, candidates)

    return error


def closest_rows(n_byzantine: int, n_selected: int) -> Condition:
    """Krum: no row that was left out has a lower score than one that was selected."""

    def error(call: Call) -> float:
        assert call.weights is not None
        distances = torch.cdist(
            call.matrix, call.matrix, compute_mode="donot_use_mm_for_euclid_dist"
        )
        n_closest = len(call.matrix) - n_byzantine - 2
        scores = distances.sort(dim=1).values[:, 1 : n_closest + 1].sum(dim=1)
        selected = call.weights > 0.0
        assert int(selected.sum()) == n_selected
        if selected.all():
            return 0.0
        return float((scores[selected].max() - scores[~selected].min()).clamp(min=0) / scores.max())

    return error


def fair(alpha: float) -> Condition:
    """FairGrad: (G x)^alpha = 1 / x on rows that are not 0.

    Where no x solves that (Pareto stationary points): positive weights whose rows cancel, which
    proves that none does.
    """

    def error(call: Call) -> float:
        assert call.weights is not None
        gains = (call.gramian @ call.weights).clamp(min=0.0)
        return _unless_stationary(call, gains * call.weights ** (1.0 / alpha))

    return error


def bargained(max_norm: float) -> Condition:
    """NashMTL: G a = 1 / a on rows that are not 0, with G of Frobenius norm 1, before clipping.

    Where no a solves that, the same as for `fair`.
    """

    def error(call: Call) -> float:
        assert call.weights is not None
        products = call.weights * (call.gramian @ call.weights) / call.gramian.norm()
        length = float((call.weights @ call.matrix).norm())
        moving = call.gramian.diagonal() > 0.0
        factor = float(products[moving].mean()) if moving.any() else 1.0
        clipped = 0.0 < factor < 1.0 and abs(length / max_norm - 1.0) < 1e-5
        return _unless_stationary(call, products / factor if clipped else products)

    return error


def _unless_stationary(call: Call, products: Tensor) -> float:
    """The products' distance from 1 on rows that are not 0, or how well the rows cancel."""
    assert call.weights is not None
    moving = call.gramian.diagonal() > 0.0
    if not moving.any():
        return 0.0
    if not (call.weights[moving] > 0.0).all():
        return torch.inf
    imbalance = float((products[moving] - 1.0).abs().max())
    if not call.ours:
        return imbalance
    terms = (call.weights * call.matrix.norm(dim=1)).sum()
    # Weights are about f^(-1/2) where eigenvalues are lifted to f, and so short is the result.
    return min(imbalance, float((call.weights @ call.matrix).norm() / terms) ** 2)


def conflict_averse(c: float, norm_eps: float) -> Condition:
    """CAGrad: the least product with a row is as great as the dual problem says it can be."""

    def error(call: Call) -> float:
        assert call.weights is not None
        m = len(call.matrix)
        trace = call.gramian.trace()
        if trace < norm_eps:
            return float(call.weights.abs().max())
        rows = call.matrix / trace.sqrt()
        mean = rows.mean(dim=0)
        radius = c * mean.norm()
        if (call.weights == 0.0).all():
            # Right only if some convex combination is shorter than norm_eps.
            return 0.0 if _shortest(rows) < norm_eps else torch.inf
        chosen = call.weights - 1.0 / m
        chosen = chosen / chosen.sum()
        if not (chosen >= -1e-6).all():
            return torch.inf
        result = call.weights @ rows
        outside = (result - mean).norm() / radius - 1.0
        combination = chosen @ rows
        bound = mean @ combination + radius * combination.norm()
        gap = (bound - (rows @ result).min()) / (radius * rows.norm(dim=1).max())
        return max(float(gap), float(outside))

    return error


def _shortest(rows: Tensor) -> float:
    """The length of the shortest convex combination, on a barely regularized Gramian."""
    m = len(rows)
    gramian = (rows @ rows.T + 1e-14 * torch.eye(m)).double().numpy()
    constraints = torch.cat([torch.ones(m, 1), torch.eye(m)], dim=1).double().numpy()
    bounds = torch.tensor([1.0] + [0.0] * m).double().numpy()
    weights = quadprog.solve_qp(gramian, bounds[1:], constraints, bounds, 1)[0]
    return float((torch.from_numpy(weights) @ rows).norm())


def prioritized(tau: float, eps: float) -> Condition:
    """PCD: the nearest direction to the primary one that keeps all promises, for a constant J.

    All the weights are 0 where that direction is 0, and those of secondary objectives where the
    promises contradict each other.
    """

    def error(call: Call) -> float:
        assert call.weights is not None
        lengths = call.matrix.norm(dim=1)
        scales = (lengths**2 + eps).rsqrt()
        rows = torch.nan_to_num(call.matrix * scales[:, None], 0.0)
        if len(rows) == 1 or not lengths[0] > 0.0:
            return _relative(call.vector.double(), call.matrix[0])
        promises = tau * rows[1:].norm(dim=1) ** 2
        if (call.weights == 0.0).all():
            return float(_nearest_direction(rows, promises)[0].norm())
        coefficients = call.weights / scales / (call.weights[0] / scales[0])
        direction = coefficients @ rows
        surplus = rows[1:] @ direction - promises
        if (coefficients[1:] == 0.0).all() and (surplus < 0.0).any():
            # Contradictory, or so nearly that the least correction is huge.
            return float(1.0 / _nearest_direction(rows, promises)[1].max())
        errors = [
            (-surplus).max(),
            (-coefficients).max(),
            (surplus * coefficients[1:]).abs().max() / coefficients.max(),
            (call.vector.norm() / lengths[0] - 1.0).abs(),
        ]
        return float(torch.stack([e.double() for e in errors]).max())

    return error


def _nearest_direction(rows: Tensor, promises: Tensor) -> tuple[Tensor, Tensor]:
    """The d nearest to the first row whose products with the others are as promised.

    Returns:
        d [n] and the multipliers [m - 1], which are infinite if there is no such d.
    """
    try:
        solution = quadprog.solve_qp(
            torch.eye(rows.shape[1]).double().numpy(),
            rows[0].numpy(),
            rows[1:].T.contiguous().numpy(),
            promises.numpy(),
        )
    except ValueError:
        return rows[0], torch.full_like(promises, torch.inf)
    return torch.from_numpy(solution[0]), torch.from_numpy(solution[4])
