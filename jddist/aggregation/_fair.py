"""The equation that FairGrad and NashMTL share: G x = x^(-power), elementwise, for x > 0.

Its solution minimizes a strictly convex function, xᵀGx / 2 minus primitives of x^(-power). With A
the cosines between the rows, l their lengths and y = l x, it reads

    A y = s,    power log y + log s = (power - 1) log l,

so that badly scaled rows leave no trace but the right-hand side. For power 1 there is not even
that: the function is self-concordant, and Newton's method with a line search finds its minimum from
anywhere. Other powers are approached from there, each one from the solution of the one before, by a
primal-dual Newton method with y and s as unknowns: its equations are never singular, and the
logarithms carry it over many orders of magnitude in few steps.

There is no solution where some v >= 0, v != 0 has Gv = 0 (a Pareto stationary point): x would be
infinite along v. Eigenvalues of A which are too small to tell from 0 are therefore lifted to a
floor. That gives such points a finite x whose Gx is almost 0, and leaves all others alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ._cosines import split_lengths
from ._host import Array

FLOOR = 1e-12  # In float64; well above rounding, since x grows to FLOOR^(-1/2).
TOLERANCE = 1e-13  # Of the residual, relative to s.
POWER_RATIO = 1.5  # Between one power and the next on the way from 1.
MAX_POWERS = 40
ROUGH_STEPS = 6  # For the powers on the way: a rough solution is all that is needed.
ROUGH_TOLERANCE = 0.1
MAX_STEPS = 60
PATIENCE = 5  # Steps without progress after which rounding must be the limit, near the solution.


class _Point(NamedTuple):
    """Both unknowns, each [m] and positive."""

    y: Array
    s: Array


def balance(gramian: Array, power: float, rounding: float, max_steps: int | None = None) -> Array:
    """Finds the x > 0 with G x = x^(-power).

    Args:
        gramian: Gramian [m, m] in float64.
        power: A positive number.
        rounding: Error of the eigenvalues of the Gramian, relative to the greatest.
        max_steps: Greatest number of Newton steps for each power on the way; None means as many as
            it takes.

    Returns:
        x [m]. It is 0 for rows of zeros, whose equations no finite number satisfies.
    """
    lengths, cosines = split_lengths(gramian)
    moving = np.flatnonzero(lengths)
    solution = np.zeros_like(lengths)
    if moving.size:
        lengths = lengths[moving]
        matrix = _lift(cosines[np.ix_(moving, moving)], max(FLOOR, rounding))
        with np.errstate(all="ignore"):
            y = _solve(matrix, np.log(lengths), power, max_steps or MAX_STEPS)
            solution[moving] = y / lengths
    return solution


def _lift(matrix: Array, floor: float) -> Array:
    """The matrix, or if it has eigenvalues below `floor`, the same with those set to it."""
    try:
        np.linalg.cholesky(matrix - floor * np.eye(len(matrix)))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.maximum(values, floor)) @ vectors.T
    return matrix


def _solve(matrix: Array, log_lengths: Array, power: float, max_steps: int) -> Array:
    y = _minimize(matrix, max_steps)
    if power == 1.0:
        return y
    point = _Point(y, 1.0 / y)
    n_powers = min(int(np.ceil(abs(np.log(power)) / np.log(POWER_RATIO))), MAX_POWERS)
    for p in power ** (np.arange(1, n_powers) / n_powers):
        targets = (p - 1.0) * log_lengths
        point = _newton(matrix, p, targets, point, min(ROUGH_STEPS, max_steps), ROUGH_TOLERANCE)
    targets = (power - 1.0) * log_lengths
    return _newton(matrix, power, targets, point, max_steps, TOLERANCE).y


def _minimize(matrix: Array, max_steps: int) -> Array:
    """The y > 0 with A y = 1 / y, the minimum of yᵀAy / 2 - sum log y, by Newton's method."""
    m = len(matrix)
    y = np.full(m, np.sqrt(m / max(matrix.sum(), 1.0)))  # The best multiple of ones.
    best, smallest, idle = y, np.inf, 0
    for _ in range(max_steps):
        slopes = y * (matrix @ y) - 1.0
        error = np.abs(slopes).max()
        idle = 0 if error < 0.7 * smallest else idle + 1
        if error < smallest:
            best, smallest = y, error
        if error < TOLERANCE or (idle >= PATIENCE and smallest < ROUGH_TOLERANCE):
            return best
        system = y[:, None] * matrix * y
        hessian = system.copy()
        hessian.flat[:: m + 1] += 1.0
        step = -np.linalg.solve(hessian, slopes)  # Relative to y.
        decrease = -(slopes @ step)
        length = min(1.0, 0.9 / max(-step.min(), 0.9))
        linear, square = system.sum(axis=0) @ step, 0.5 * (step @ system @ step)
        # Near the minimum, where rounding hides progress, whole steps are known to converge.
        while decrease > 0.1 and length > 1e-6:
            change = length * linear + length**2 * square - np.log1p(length * step).sum()
            if change <= -0.1 * length * decrease:
                break
            length *= 0.5
        y = y * (1.0 + length * step)
    return best


def _newton(
    matrix: Array, power: float, targets: Array, start: _Point, max_steps: int, tolerance: float
) -> _Point:
    """Newton's method for A y = s and power log y + log s = targets, from a positive start.

    The second equation is followed in portions of at most `reach`, as far as the linear model of
    the logarithms can be trusted.
    """
    unit = max(1.0, power)
    y, s = start
    gap, excess = s - matrix @ y, targets - power * np.log(y) - np.log(s)
    best, best_residual, idle, reach = start, np.inf, 0, 3.0 * unit
    for _ in range(max_steps + 1):
        residual = max(np.abs(gap / s).max(), np.abs(excess).max() / unit)
        idle = 0 if residual < 0.7 * best_residual else idle + 1
        if residual < best_residual:
            best, best_residual = _Point(y, s), residual
        stuck = idle >= PATIENCE and best_residual < ROUGH_TOLERANCE
        if residual < tolerance or stuck or not np.isfinite(residual):
            break
        portion = np.clip(excess, -reach, reach)
        # (A + power diag(s / y)) dy = gap + s portion, scaled to a well-conditioned system.
        scale = np.sqrt(y / s)
        system = scale[:, None] * matrix * scale
        system.flat[:: len(y) + 1] += power
        step = scale * np.linalg.solve(system, scale * (gap + s * portion))
        slope = matrix @ step - gap
        length = 1.0 / max(1.0, -(step / y).min() / 0.9, -(slope / s).min() / 0.9)
        y_new, s_new = y + length * step, s + length * slope
        excess_new = targets - power * np.log(y_new) - np.log(s_new)
        error = np.abs(excess_new - excess + length * portion).max()
        if not error <= max(2.0 * unit, 0.5 * np.abs(excess).max()):
            reach = min(reach, np.abs(portion).max()) / 3.0
            continue
        if error < unit:
            reach *= 3.0
        y, s, excess = y_new, s_new, excess_new
        gap = s - matrix @ y
    return best
