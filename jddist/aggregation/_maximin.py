"""The problem inside CAGrad: within a ball, what raises the least of several linear functions most?

    maximize t  subject to  b + R e >= t  and  |e| <= 1

Its multipliers are w on the simplex, one per function, and v >= 0 of the ball, with Rᵀw = v e at
the optimum. The dual problem is to minimize bᵀw + |Rᵀw| over the simplex. That norm has no
derivative at 0, where it matters (v = 0: Pareto stationary points); the primal problem is smooth
everywhere. Hence a primal-dual interior-point method on it, with Mehrotra's predictor and
corrector: 10 to 20 steps of one linear system [r + 1, r + 1] each, on any matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ._host import Array

MAX_STEPS = 60
TOLERANCE = 1e-16  # Of the duality gap, when the ball has the radius 1.
PATIENCE = 5  # Steps without progress after which rounding must be the limit.


@dataclass
class _Iterate:
    """A point that strictly satisfies the constraints (its slacks are exact), and multipliers."""

    point: Array  # e [r]
    level: float  # t
    slacks: Array  # b + R e - t [m]
    ball_slack: float  # (1 - |e|²) / 2
    weights: Array  # w [m]
    ball_weight: float  # v

    def gap(self) -> float:
        return float(self.weights @ self.slacks + self.ball_weight * self.ball_slack)


@dataclass
class _Step:
    """A direction for every part of an iterate but the ball's slack, which is quadratic."""

    point: Array
    level: float
    slacks: Array
    weights: Array
    ball_weight: float


def maximin(rows: Array, offsets: Array) -> Array:
    """Finds the weights w on the simplex that minimize offsetsᵀw + |rowsᵀw|.

    Args:
        rows: R [m, r], m > 0, with independent columns.
        offsets: b [m].

    Returns:
        w [m]. The duality gap is below rounding error, or as small as rounding lets it become.
    """
    current = _start(rows, offsets)
    best, smallest, idle = current.weights, np.inf, 0
    for _ in range(MAX_STEPS):
        residual = current.ball_weight * current.point - current.weights @ rows
        error = max(current.gap(), float(np.abs(residual).max(initial=0.0)))
        idle = 0 if error < smallest else idle + 1
        if error < smallest:
            best, smallest = current.weights, error
        if error < TOLERANCE or idle >= PATIENCE or not np.isfinite(error):
            break
        try:
            current = _advance(rows, current, residual)
        except np.linalg.LinAlgError:
            break  # Singular by rounding.
    return best / best.sum()


def _start(rows: Array, offsets: Array) -> _Iterate:
    m, r = rows.shape
    weights = np.full(m, 1.0 / m)
    margin = 0.5 * max(float(np.ptp(offsets)), float(np.abs(rows).sum(axis=1).max(initial=0.0)))
    level = float(offsets.min()) - margin - 1e-12
    ball_weight = max(float(np.linalg.norm(weights @ rows)), 1e-3)
    return _Iterate(np.zeros(r), level, offsets - level, 0.5, weights, ball_weight)


def _advance(rows: Array, at: _Iterate, residual: Array) -> _Iterate:
    """One predictor-corrector step. `residual` is v e - Rᵀw."""
    solve = _linearize(rows, at, residual)
    products, ball_product = at.weights * at.slacks, at.ball_weight * at.ball_slack
    mean_gap = at.gap() / (len(products) + 1)
    guess = solve(products, ball_product)
    predicted = _move(at, guess, _length(at, guess, 1.0))
    ratio = predicted.gap() / (len(products) + 1) / mean_gap
    target = mean_gap * min(1.0, max(ratio, 1e-4)) ** 3
    # What the linear model of the products leaves out.
    curvature = float(at.point @ guess.point) * guess.ball_weight
    curvature += 0.5 * at.ball_weight * float(guess.point @ guess.point)
    products += guess.weights * guess.slacks
    step = solve(products - target, ball_product - target - curvature)
    return _move(at, step, _length(at, step, 0.995))


def _linearize(rows: Array, at: _Iterate, residual: Array) -> Callable[[Array, float], _Step]:
    """Newton's system for v e = Rᵀw, sum w = 1, w * slacks = .., v * ball slack = .. ."""
    r = rows.shape[1]
    stiffness = at.weights / at.slacks
    system = np.empty((r + 1, r + 1))
    system[:r, :r] = (rows.T * stiffness) @ rows
    system[:r, :r] += (at.ball_weight / at.ball_slack) * np.outer(at.point, at.point)
    system.flat[: r * (r + 1) : r + 2] += at.ball_weight
    system[r, :r] = system[:r, r] = -(stiffness @ rows)
    system[r, r] = stiffness.sum()
    scale = 1.0 / np.sqrt(system.diagonal())
    system = scale[:, None] * system * scale

    def solve(products: Array, ball_product: float) -> _Step:
        """The step that makes the complementarity products smaller by the given amounts."""
        quotients = products / at.slacks
        right = np.empty(r + 1)
        right[:r] = at.point * (ball_product / at.ball_slack) - residual - quotients @ rows
        right[r] = quotients.sum() + 1.0 - at.weights.sum()
        solution = scale * np.linalg.solve(system, scale * right)
        point, level = solution[:r], float(solution[r])
        slacks = rows @ point - level
        weights = -quotients - stiffness * slacks
        ball_weight = (at.ball_weight * (at.point @ point) - ball_product) / at.ball_slack
        return _Step(point, level, slacks, weights, float(ball_weight))

    return solve


def _length(at: _Iterate, step: _Step, share: float) -> float:
    """How much of a step, at most 1, uses up no more than this share of any slack or multiplier."""
    length = share / max(
        share,
        float((-step.slacks / at.slacks).max()),
        float((-step.weights / at.weights).max()),
        -step.ball_weight / at.ball_weight,
    )
    # The ball's slack falls by linear * length + square * length².
    linear, square = float(at.point @ step.point), 0.5 * float(step.point @ step.point)
    root = np.sqrt(linear**2 + 4.0 * square * share * at.ball_slack)
    if linear + root > 0.0:
        length = min(length, 2.0 * share * at.ball_slack / (linear + root))
    return length


def _move(at: _Iterate, step: _Step, length: float) -> _Iterate:
    linear, square = float(at.point @ step.point), 0.5 * float(step.point @ step.point)
    ball_slack = at.ball_slack - length * linear - length**2 * square
    return _Iterate(
        at.point + length * step.point,
        at.level + length * step.level,
        at.slacks + length * step.slacks,
        max(ball_slack, np.finfo(float).tiny),
        at.weights + length * step.weights,
        at.ball_weight + length * step.ball_weight,
    )
