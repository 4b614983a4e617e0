"""What a Gramian and weights tell about a step: pure mathematics of small matrices.

With G = J Jᵀ and the update d = Jᵀ w: the gradients' lengths are the roots of G's diagonal, d's
length is the root of wᵀ G w, and G w holds the inner products of d with each gradient. So
everything here follows from what rank 0 has anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

# Cosines above this are no conflict: rounding leaves orthogonal float32 gradients about 1e-7 apart.
CONFLICT = -1e-6
# Of more objectives, this many evenly spaced ones are compared pair by pair.
MOST_COMPARED = 1024


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is known of a step from its Gramian [m, m] and weights [m].

    Attributes:
        norms: The gradients' lengths [m].
        cosines: Cosine similarities of the gradients, [m, m] or of some of them; NaN with a
            gradient of length zero.
        weights: The weights [m], or None.
        conflict_rate: The share of pairs of gradients with a negative inner product.
        imbalance: The longest gradient's length over the shortest's.
        mean_norm: The length of the mean gradient.
        update_norm: The length of the update, NaN if it is not known.
        update_cosines: Cosine similarities of the update with each gradient [m]; None if unknown.
        update_conflict_rate: The share of the gradients with which the update has a negative inner
            product: the objectives that a small step makes worse.
        update_mean_cosine: The cosine similarity of the update with the mean gradient.
    """

    norms: Array
    cosines: Array
    weights: Array | None
    conflict_rate: float
    imbalance: float
    mean_norm: float
    update_norm: float
    update_cosines: Array | None
    update_conflict_rate: float
    update_mean_cosine: float


def statistics_of(
    gramian: Array,
    weights: Array | None,
    progress: Array | None = None,
    update_norm: float | None = None,
) -> Statistics:
    """The statistics of a step.

    Args:
        gramian: G [m, m].
        weights: w [m], if the update is Jᵀ w or if they are worth recording.
        progress: J d [m], if the update d is another one.
        update_norm: |d|, with ``progress``.
    """
    m = len(gramian)
    norms = np.sqrt(np.clip(np.diagonal(gramian), 0.0, None))
    mean_norm = float(np.sqrt(max(0.0, float(gramian.sum())))) / m if m else np.nan
    if progress is None and weights is not None:
        progress = gramian @ weights
        update_norm = float(np.sqrt(max(0.0, float(weights @ progress))))
    elif progress is None:
        update_norm = None
    length = np.nan if update_norm is None else update_norm
    cosines = _cosines(gramian, norms)
    with np.errstate(divide="ignore", invalid="ignore"):
        pairs = pairs_of(cosines)
        imbalance = norms.max() / norms.min() if m else np.nan
        update_cosines = None if progress is None else np.clip(progress / norms / length, -1, 1)
        along_mean = np.nan if progress is None or not m else progress.mean() / mean_norm / length
    worse = np.nan
    if update_cosines is not None and m:
        worse = float((update_cosines < CONFLICT).mean())
    return Statistics(
        norms=norms,
        cosines=cosines,
        weights=weights,
        conflict_rate=float((pairs < CONFLICT).mean()) if len(pairs) else np.nan,
        imbalance=float(imbalance),
        mean_norm=mean_norm,
        update_norm=float(length),
        update_cosines=update_cosines,
        update_conflict_rate=worse,
        update_mean_cosine=float(np.clip(along_mean, -1, 1)),
    )


@lru_cache(maxsize=4)
def below_diagonal(m: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The indices of a matrix [m, m] below its diagonal, row by row."""
    return np.tril_indices(m, -1)


def pairs_of(matrix: Array) -> Array:
    """The entries below the diagonal: one for each pair."""
    return matrix[below_diagonal(len(matrix))]


def _cosines(gramian: Array, norms: Array) -> Array:
    m = len(norms)
    if m > MOST_COMPARED:
        some = np.linspace(0, m - 1, MOST_COMPARED).round().astype(int)
        gramian, norms = gramian[np.ix_(some, some)], norms[some]
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1.0 / norms
        cosines = gramian * inverse
        cosines *= inverse[:, None]
    cosines[~np.isfinite(cosines)] = np.nan
    return np.clip(cosines, -1.0, 1.0, out=cosines)


def matrix_of(gramian: Array) -> Array:
    """A generalized Gramian [m1, ..., mk, mk, ..., m1] as a matrix [m, m]."""
    half = gramian.ndim // 2
    forward = [*range(half), *reversed(range(half, 2 * half))]
    m = int(np.prod(gramian.shape[:half]))
    return gramian.transpose(forward).reshape(m, m)


def of_tasks(
    gramian: Array, weights: Array, progress: Array, sample_dim: int
) -> tuple[Array, Array, Array]:
    """From objectives that are samples x tasks to tasks, each the mean over the samples.

    The gradient of a task is then the mean of its samples' gradients, so the Gramian of the tasks
    is a mean of entries of the whole one; the update stays what it is.

    Args:
        gramian: Generalized, [m1, ..., mk, mk, ..., m1].
        weights: [m1, ..., mk].
        progress: J d, of the same shape.
        sample_dim: Which of the dimensions counts the samples.

    Returns:
        The Gramian [t, t] of the tasks, the sum of each task's weights [t], and J d [t].
    """
    mirrored = gramian.ndim - 1 - sample_dim
    reduced = gramian.mean(axis=(sample_dim, mirrored))
    return (
        matrix_of(reduced),
        weights.sum(axis=sample_dim).reshape(-1),
        progress.mean(axis=sample_dim).reshape(-1),
    )
