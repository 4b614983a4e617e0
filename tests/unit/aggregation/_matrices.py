"""Jacobians for the tests: named kinds from a seed, and small ones drawn by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

KINDS = ["random", "rank 1", "rank 2", "zero row", "duplicate row", "conflicting", "badly scaled"]
N_COLUMNS = 11


def make_matrix(kind: str, m: int, seed: int, n: int = N_COLUMNS) -> Tensor:
    """A Jacobian [m, n] in float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    matrix = randn(m, n)
    if kind == "rank 1":
        matrix = randn(m, 1) @ randn(1, n)
    elif kind == "rank 2":
        matrix = randn(m, 2) @ randn(2, n)
    elif kind == "zero row":
        matrix[0] = 0.0
    elif kind == "duplicate row":
        matrix[-1] = matrix[0]
    elif kind == "conflicting":
        signs = torch.tensor([(-1.0) ** i for i in range(m)], dtype=torch.float64)
        matrix = signs[:, None] * randn(1, n) + 0.3 * matrix
    elif kind == "badly scaled":
        matrix *= 10.0 ** torch.arange(-2, m - 2, dtype=torch.float64)[:, None]
    else:
        assert kind == "random"
    return matrix


@st.composite
def small_matrices(draw: st.DrawFn, max_rows: int = 5, max_columns: int = 6) -> Tensor:
    """A Jacobian of quarters between -4 and 4: its Gramian is exact, ties and zeros common."""
    m = draw(st.integers(1, max_rows))
    n = draw(st.integers(1, max_columns))
    quarters = draw(st.lists(st.integers(-16, 16), min_size=m * n, max_size=m * n))
    return torch.tensor(quarters, dtype=torch.float64).reshape(m, n) / 4
