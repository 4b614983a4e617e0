"""A Gramian apart into the rows' lengths and the cosines of their angles."""

from __future__ import annotations

import numpy as np

from ._host import Array


def split_lengths(gramian: Array) -> tuple[Array, Array]:
    """Lengths [m] of the rows and cosines [m, m] between them, of a Gramian [m, m] in float64.

    A zero row has cosine 0 with every row and with itself. Cosines that rounding has pushed beyond
    1 are brought back.
    """
    lengths = np.sqrt(np.maximum(gramian.diagonal(), 0.0))
    inverses = invert(lengths)
    with np.errstate(over="ignore"):
        cosines = (gramian * inverses[:, None]) * inverses
    return lengths, np.minimum(np.maximum(cosines, -1.0), 1.0)


def invert(values: Array) -> Array:
    """1 / values, and 0 where a value is 0."""
    if values.all():
        return 1.0 / values
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > 0.0)
