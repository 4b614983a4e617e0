"""What the papers demand of each method's result, as errors computed in float64 from the Jacobian.

They are independent of how the package solves the problems: singular value decompositions of J,
optimality conditions, brute force.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.unit.aggregation._parity import Call
from tests.unit.linalg.test_dual_cone import one_by_one

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
        candidates = []
        for rank in range(1, len(S) + 1):
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
    """FairGrad: (G x)^alpha = 1 / x on rows that are not 0, or the rows add up to 0.

    With positive weights x that nearly cancel, the point is Pareto stationary: no x solves it.
    """

    def error(call: Call) -> float:
        assert call.weights is not None
        moving = call.gramian.diagonal() > 0.0
        weights = call.weights[moving]
        if not moving.any():
            return 0.0
        if not (weights > 0.0).all():
            return torch.inf
        gains = call.gramian[moving] @ call.weights
        imbalance = float((gains.clamp(min=0.0) * weights ** (1.0 / alpha) - 1.0).abs().max())
        return min(imbalance, _cancellation(call))

    return error


def bargained(call: Call) -> float:
    """NashMTL: G a = 1 / a up to the factor by which a was clipped, on rows that are not 0."""
    assert call.weights is not None
    products = call.weights * (call.gramian @ call.weights)
    products = products[call.gramian.diagonal() > 0.0]
    if len(products) == 0:
        return 0.0
    if not (products > 0.0).all():
        return _cancellation(call)
    return min(float((products / products.mean() - 1.0).abs().max()), _cancellation(call))


def _cancellation(call: Call) -> float:
    """How long a combination with positive weights is, relative to the sum of its terms."""
    assert call.weights is not None
    if not (call.weights >= 0.0).all():
        return torch.inf
    terms = (call.weights * call.matrix.norm(dim=1)).sum()
    # The result is as short as sqrt(floor) at a Pareto stationary point: count its square.
    return float((call.weights @ call.matrix).norm() / terms) ** 2


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
    """The length of the shortest convex combination, by quadprog on a hardly altered Gramian."""
    import quadprog

    m = len(rows)
    gramian = (rows @ rows.T + 1e-14 * torch.eye(m)).double().numpy()
    constraints = torch.cat([torch.ones(m, 1), torch.eye(m)], dim=1).double().numpy()
    bounds = torch.tensor([1.0] + [0.0] * m).double().numpy()
    weights = quadprog.solve_qp(gramian, bounds[1:], constraints, bounds, 1)[0]
    return float((torch.from_numpy(weights) @ rows).norm())


__all__ = [
    "aligned",
    "bargained",
    "closest_rows",
    "conflict_averse",
    "equal_angles",
    "equal_projections",
    "fair",
    "one_by_one",
]
