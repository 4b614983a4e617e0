"""Gramians [m, m] of many objectives, of every kind that makes quadratic programs hard."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = [
    "well-conditioned",
    "square",
    "low rank",
    "rank 8",
    "rank 1",
    "near duplicates",
    "duplicates",
    "conflicting",
    "strongly conflicting",
    "opposite pairs",
    "clusters",
    "common part",
    "badly scaled",
    "power law",
    "chain",
    "simplex",
    "zero",
]


def make_gramian(kind: str, m: int, seed: int = 0) -> Tensor:
    """A Gramian [m, m] in float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    signs = (-torch.ones(m, 1, dtype=torch.float64)) ** torch.arange(m)[:, None]
    if kind == "well-conditioned":
        matrix = randn(m, 4 * m)
    elif kind == "square":
        matrix = randn(m, m)
    elif kind == "low rank":
        matrix = randn(m, max(m // 4, 1))
    elif kind.startswith("rank "):
        matrix = randn(m, int(kind.split()[1]))
    elif kind in ("near duplicates", "duplicates"):
        matrix = randn(m, 2 * m)
        matrix = matrix[torch.arange(m) % ((m + 1) // 2)]
        if kind == "near duplicates":
            matrix += 1e-3 * randn(m, 2 * m)
    elif kind == "conflicting":
        matrix = signs * randn(1, 2 * m) + 0.3 * randn(m, 2 * m)
    elif kind == "strongly conflicting":
        matrix = signs * randn(1, 2 * m) + 0.03 * randn(m, 2 * m)
    elif kind == "opposite pairs":
        matrix = signs * randn((m + 1) // 2, m).repeat_interleave(2, dim=0)[:m]
        matrix += 0.01 * randn(m, m)
    elif kind == "clusters":
        matrix = randn(8, 2 * m)[torch.arange(m) % 8] * randn(m, 1).sign() + 0.1 * randn(m, 2 * m)
    elif kind == "common part":
        matrix = randn(1, 2 * m) + 3.0 * randn(m, 2 * m)
    elif kind == "badly scaled":
        scales = torch.rand(m, 1, generator=generator, dtype=torch.float64)
        matrix = randn(m, 4 * m) * 10.0 ** (8.0 * scales - 4.0)
    elif kind == "power law":
        matrix = randn(m, 2 * m) / torch.arange(1, 2 * m + 1)
    elif kind == "chain":  # the second difference: solutions reach far
        return 2.0 * torch.eye(m, dtype=torch.float64) - sum(
            torch.diag(torch.ones(m - 1, dtype=torch.float64), k) for k in (-1, 1)
        )
    elif kind == "simplex":  # every two objectives conflict equally, and their sum is zero
        return torch.eye(m, dtype=torch.float64) - 1.0 / m
    else:
        assert kind == "zero"
        matrix = torch.zeros(m, 1, dtype=torch.float64)
    return matrix @ matrix.T
