"""Short texts for vectors of weights, for the `str` of aggregators and scalarizers."""

from __future__ import annotations

from torch import Tensor


def vector_suffix(vector: Tensor | None) -> str:
    """The text "([1., 0.25])" for a vector, and "" for None."""
    if vector is None:
        return ""
    values = ", ".join(f"{value:.2f}".rstrip("0") for value in vector.tolist())
    return f"([{values}])"
