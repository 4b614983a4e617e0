"""The problem inside PCD: the least correction of a vector that meets linear conditions.

    minimize |x|² / 2  subject to  h_j . x >= b_j  for all j

Only the Gramian H of the vectors h_j is known; the solution is a combination of them with the
multipliers u >= 0 of the conditions, and the dual problem is to minimize uᵀHu / 2 - bᵀu. It is
solved exactly by the dual active-set method of Goldfarb and Idnani (1983).
"""

from __future__ import annotations

import numpy as np

from ._host import Array


class _ActiveSet:
    """Conditions that hold with equality, and the inverse Cholesky factor of their Gramian."""

    def __init__(self, gramian: Array) -> None:
        self.gramian = gramian
        self.indices: list[int] = []
        self._inverse = np.zeros_like(gramian)  # L⁻¹ in its upper left corner.

    def expand(self, candidate: int) -> tuple[Array, float]:
        """The vector of `candidate` in terms of the active ones, and what is left of its square."""
        k = len(self.indices)
        inverse = self._inverse[:k, :k]
        part = inverse @ self.gramian[self.indices, candidate]
        return part @ inverse, float(self.gramian[candidate, candidate] - part @ part)

    def add(self, candidate: int, expansion: Array, rest: float) -> None:
        """Adds a condition, given its `expand`."""
        k = len(self.indices)
        self._inverse[k, :k] = -expansion / np.sqrt(rest)
        self._inverse[k, k] = 1.0 / np.sqrt(rest)
        self.indices.append(candidate)

    def drop(self, position: int) -> None:
        """Drops the condition at this position."""
        del self.indices[position]
        k = len(self.indices)
        factor = np.linalg.cholesky(self.gramian[np.ix_(self.indices, self.indices)])
        self._inverse[:k, :k] = np.linalg.inv(factor)


def nearest_in_cone(gramian: Array, bounds: Array, tolerance: float, dependent: float) -> Array:
    """Finds the multipliers of the shortest x with h_j . x >= bounds_j.

    Args:
        gramian: H [k, k].
        bounds: b [k].
        tolerance: How far a product may stay below its bound.
        dependent: A vector counts as dependent on others if the squared length of its component
            orthogonal to them is at most this share of its own. Rounding in H should stay below
            it, or dependent vectors look independent and get huge multipliers.

    Returns:
        u [k] >= 0, or zeros if no x meets all conditions.
    """
    multipliers = np.zeros_like(bounds)
    active = _ActiveSet(gramian)
    budget = 10 * (len(bounds) + 1)  # About k steps suffice; rounding might let them cycle.
    try:
        while budget > 0 and len(bounds):
            slacks = gramian @ multipliers - bounds
            slacks[active.indices] = 0.0
            candidate = int(slacks.argmin())
            if slacks[candidate] >= -tolerance:
                break
            steps = _activate(active, candidate, multipliers, bounds, dependent, budget)
            if steps == 0:
                return np.zeros_like(bounds)
            budget -= steps
    except np.linalg.LinAlgError:
        pass  # Rounding made the active set singular: the multipliers so far are the best guess.
    return np.maximum(multipliers, 0.0)


def _activate(
    active: _ActiveSet,
    candidate: int,
    multipliers: Array,
    bounds: Array,
    dependent: float,
    budget: int,
) -> int:
    """Raises the candidate's multiplier until its condition holds with equality.

    Active multipliers follow; those that reach 0 on the way leave the active set.

    Returns:
        The number of steps, or 0 if the condition contradicts the active ones.
    """
    square = active.gramian[candidate, candidate]
    for count in range(1, budget + 1):
        missing = bounds[candidate] - active.gramian[candidate] @ multipliers
        expansion, rest = active.expand(candidate)
        full = missing / rest if rest > dependent * square else np.inf
        shrinking = np.flatnonzero(expansion > 0.0)
        current = multipliers[active.indices]
        ratios = current[shrinking] / expansion[shrinking]
        partial = ratios.min(initial=np.inf)
        step = min(full, partial)
        if step == np.inf:
            return 0
        multipliers[active.indices] = current - step * expansion
        multipliers[candidate] += step
        if full <= partial:
            active.add(candidate, expansion, rest)
            return count
        position = int(shrinking[ratios.argmin()])
        multipliers[active.indices[position]] = 0.0
        active.drop(position)
    return budget
