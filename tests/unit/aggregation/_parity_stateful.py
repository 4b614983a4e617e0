"""Comparing methods with a memory, a mask or two batches with torchjd's, over calls in a row."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torchjd.aggregation as peer
from torch import Tensor

import jddist.aggregation as ours
from tests.unit.aggregation._matrices import KINDS, N_COLUMNS, make_matrix

SIZES = [1, 2, 4, 7]
SEEDS = range(3)
CALLS = 6
# Sums of at most 11 products of numbers of the size of J, each call feeding the next: some hundred
# roundings, of 1e-16 and 6e-8 each.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}


def _pref(m: int) -> Tensor:
    return torch.arange(1.0, m + 1.0, dtype=torch.float64)


# Name, then how to make the method from either library's module for m objectives.
AGGREGATORS: dict[str, Callable[[Any, int], Any]] = {
    "GradDrop": lambda lib, m: lib.GradDrop(),
    "GradDrop, leaking": lambda lib, m: lib.GradDrop(leak=_pref(m) / m),
    "GradDrop, steep": lambda lib, m: lib.GradDrop(f=lambda p: p.square()),
    "TrimmedMean 0": lambda lib, m: lib.TrimmedMean(0),
    "TrimmedMean": lambda lib, m: lib.TrimmedMean((m - 1) // 2),
    "ExcessMTL": lambda lib, m: lib.ExcessMTL(),
    "ExcessMTL, slow": lambda lib, m: lib.ExcessMTL(robust_step_size=1e-2),
    "ExcessMTL, warm": lambda lib, m: lib.ExcessMTL(0.1, n_warmup_steps=3),
    "CRMOGM(Mean)": lambda lib, m: lib.WeightedAggregator(lib.CRMOGMWeighting(lib.MeanWeighting())),
    "CRMOGM(Random)": lambda lib, m: lib.WeightedAggregator(
        lib.CRMOGMWeighting(lib.RandomWeighting(), 0.5, _pref(m))
    ),
    "CRMOGM(PCGrad)": lambda lib, m: lib.GramianWeightedAggregator(
        lib.CRMOGMWeighting(lib.PCGradWeighting())
    ),
    "CRMOGM(ExcessMTL)": lambda lib, m: lib.WeightedAggregator(
        lib.CRMOGMWeighting(lib.ExcessMTLWeighting(), alpha=0.25)
    ),
}
# Weightings of the products of two batches' gradients.
TWO_BATCHES: dict[str, Callable[[Any, int], Any]] = {
    "MoDo": lambda lib, m: lib.MoDoWeighting(),
    "MoDo, plain": lambda lib, m: lib.MoDoWeighting(gamma=0.5, rho=0.0),
    "SDMGrad": lambda lib, m: lib.SDMGradWeighting(),
    "SDMGrad, pulled": lambda lib, m: lib.SDMGradWeighting(
        1.0, 0.0, 5, 2.0, _pref(m) / sum(range(m + 1))
    ),
}


def _jacobians(kind: str, m: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    return [make_matrix(kind, m, 100 * seed + call).to(dtype) for call in range(CALLS + 1)]


def _aggregates(method: Any, jacobians: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    return [method(j) for j in jacobians[:CALLS]], torch.get_rng_state()


def _weighs(method: Any, jacobians: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    # Two batches of the same objectives: gradients that differ, but are correlated.
    pairs = zip(jacobians, jacobians[1:], strict=False)
    products = [first @ (first + 0.5 * second).T for first, second in pairs]
    return [method(product) for product in products], torch.get_rng_state()


def _distances(some: list[Tensor], others: list[Tensor], scales: list[float]) -> list[float]:
    pairs = zip(some, others, scales, strict=True)
    return [float((a - b).norm()) / scale for a, b, scale in pairs]


def _compare(
    make: Callable[[Any, int], Any],
    run: Callable[[Any, list[Tensor]], tuple[list[Tensor], Tensor]],
    dtype: torch.dtype,
    *,
    permutable: bool = True,
    amplification: float = 1.0,
) -> tuple[int, list[str], float]:
    """Compares on all matrices: how many cells, those excluded, and the largest difference.

    Where the peer changes by a tenth of the limit when the columns of J change places, the problem
    has no answer to agree on. Where its weights leave the simplex by as much (it projects points of
    size 1e8 without moving them to the origin first), ours, which do not, are right.
    """
    limit, compared, excluded, largest = LIMITS[dtype] * amplification, 0, [], 0.0
    order = torch.randperm(N_COLUMNS, generator=torch.Generator().manual_seed(0))
    for kind, m, seed in product(KINDS, SIZES, SEEDS):
        jacobians = _jacobians(kind, m, seed, dtype)
        expected, position = run(make(peer, m), jacobians)
        vectors = run is _aggregates
        scales = [(float(j.norm()) or 1.0) if vectors else 1.0 for j in jacobians[:CALLS]]
        if permutable:
            permuted, _ = run(make(peer, m), [j[:, order] for j in jacobians])
            permuted = [p[order.argsort()] for p in permuted] if vectors else permuted
            off = [] if vectors else [abs(float(w.sum()) - 1.0) for w in expected]
            if max(_distances(permuted, expected, scales) + off) > limit / 10:
                excluded.append(f"{kind} {m}")
                continue
        actual, own_position = run(make(ours, m), jacobians)
        assert torch.equal(own_position, position)
        assert all(a.dtype == dtype for a in actual)
        difference = max(_distances(actual, expected, scales))
        assert difference <= limit, (kind, m, seed)
        compared, largest = compared + 1, max(largest, difference)
    return compared, excluded, largest


def compare_stateful(name: str, dtype: torch.dtype) -> tuple[int, list[str], float]:
    """All cells of a method: how many were compared, those excluded, and the largest difference.

    Raises:
        AssertionError: A difference is above its limit, or the random draws differ.
    """
    if name in AGGREGATORS:
        permutable = not name.startswith("GradDrop")  # whose draws belong to columns
        return _compare(AGGREGATORS[name], _aggregates, dtype, permutable=permutable)
    # Each of SDMGrad's 20 steps, of size 10, multiplies an error until the projection stops it.
    amplification = 100.0 if name.startswith("SDMGrad") else 1.0
    return _compare(TWO_BATCHES[name], _weighs, dtype, amplification=amplification)
