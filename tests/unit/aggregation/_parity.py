"""Comparing a method with torchjd's, cell by cell.

A cell is a method, a kind of matrix, its number of rows, a dtype and a seed. Every call in it is
either compared or, where torchjd gives no answer to compare with, excluded:

- it raises an error,
- it disagrees with itself by more than a tenth of the tolerance when the columns of the Jacobian
  are permuted (the problem is ill-conditioned), or
- it misses the condition that the paper states for the solution.

An excluded call must meet the paper's condition instead; so must all others where one is stated.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

import jddist.aggregation as ours
from tests.unit.aggregation._matrices import KINDS, make_matrix

DTYPES = (torch.float64, torch.float32)
SIZES = (1, 2, 4, 7)


@dataclass(frozen=True, eq=False)
class Call:
    """One result: the Jacobian [m, n] in float64, the weights [m] if any, and the vector [n]."""

    matrix: Tensor
    weights: Tensor | None
    vector: Tensor
    dtype: torch.dtype
    ours: bool

    @property
    def gramian(self) -> Tensor:
        return self.matrix @ self.matrix.T


@dataclass(frozen=True, eq=False)
class Method:
    """A method with parameters, and what counts as the same result.

    Limits are pairs for float64 and float32.

    Attributes:
        label: Its name in the table.
        name: The name of the aggregator in both packages.
        limits: Largest relative difference of the vectors.
        why: The reason for these limits.
        parameters: Of the aggregator, given the number of rows.
        peer_parameters: The same for torchjd, where they differ.
        calls: How often an instance is called in a cell, given its kind.
        sizes: Numbers of rows.
        n_seeds: Number of matrices of each kind, size and dtype.
        n_permutations: How often torchjd is asked again, with permuted columns. 0 for methods that
            only round: their limits are to be met whatever torchjd makes of a permutation.
        of_matrix: Whether differences are relative to the Jacobian plus the vector, as they are
            for methods that add rows without solving anything: the vector may be what is left when
            long rows cancel. Otherwise they are relative to the vector.
        measure: What of the vector is compared.
        condition: How far a call is from the paper's condition; None if no cell may be excluded.
        condition_limits: Largest value of `condition` for ours.
        peer_limits: The value of `condition` above which torchjd's result is not compared with.
    """

    label: str
    name: str
    limits: tuple[float, float]
    why: str
    parameters: Callable[[int], Mapping[str, Any]] = lambda m: {}
    peer_parameters: Callable[[int], Mapping[str, Any]] | None = None
    calls: Callable[[str], int] = lambda kind: 3
    sizes: Sequence[int] = SIZES
    n_seeds: int = 3
    n_permutations: int = 1
    of_matrix: bool = False
    measure: Callable[[Tensor], Tensor] = lambda vector: vector
    condition: Callable[[Call], float] | None = None
    condition_limits: tuple[float, float] = (0.0, 0.0)
    peer_limits: tuple[float, float] = (inf, inf)

    def make_mine(self, m: int) -> nn.Module:
        return getattr(ours, self.name)(**self.parameters(m))

    def make_peer(self, m: int) -> nn.Module:
        import torchjd.aggregation as peer

        return getattr(peer, self.name)(**(self.peer_parameters or self.parameters)(m))


@dataclass(frozen=True)
class Exclusion:
    """A call that was not compared."""

    cell: str
    reason: str


@dataclass
class Outcome:
    """What came of some cells."""

    compared: int = 0
    largest: dict[torch.dtype, float] = field(default_factory=lambda: dict.fromkeys(DTYPES, 0.0))
    exclusions: list[Exclusion] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        self.compared += other.compared
        self.exclusions += other.exclusions
        self.failures += other.failures
        for dtype in DTYPES:
            self.largest[dtype] = max(self.largest[dtype], other.largest[dtype])


@cache
def compare(method: Method, kind: str) -> Outcome:
    """All cells of a method on one kind of matrix."""
    outcome = Outcome()
    for m in method.sizes:
        for dtype in DTYPES:
            for seed in range(method.n_seeds):
                _compare_cell(method, kind, m, dtype, seed, outcome)
    return outcome


def summarize(method: Method) -> Outcome:
    """All cells of a method."""
    outcome = Outcome()
    for kind in KINDS:
        outcome.add(compare(method, kind))
    return outcome


def table(methods: Sequence[Method]) -> str:
    """One line per method: comparisons, exclusions and the largest differences."""
    header = f"{'method':24} {'compared':>8} {'excluded':>8} {'float64':>9} {'float32':>9}"
    lines = [header, "-" * len(header)]
    for method in methods:
        outcome = summarize(method)
        differences = [outcome.largest[dtype] for dtype in DTYPES]
        failed = f"  {len(outcome.failures)} FAILED" if outcome.failures else ""
        lines.append(
            row(method.label, outcome.compared, len(outcome.exclusions), differences) + failed
        )
    return "\n".join(lines)


def row(label: str, compared: int, excluded: int, differences: Sequence[float]) -> str:
    """A line of the table."""
    largest = " ".join(f"{difference:9.1e}" for difference in differences)
    return f"{label:24} {compared:8} {excluded:8} {largest}"


def _compare_cell(
    method: Method, kind: str, m: int, dtype: torch.dtype, seed: int, outcome: Outcome
) -> None:
    matrix = make_matrix(kind, m, seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    orders = [
        torch.randperm(matrix.shape[1], generator=generator) for _ in range(method.n_permutations)
    ]
    mine, theirs = method.make_mine(m), method.make_peer(m)
    permuted = [method.make_peer(m) for _ in orders]
    for k in range(method.calls(kind)):
        cell = f"{method.label}, {kind}, m={m}, {str(dtype).removeprefix('torch.')}, {seed=}, {k=}"
        draw = 10 * seed + k
        actual, position = _run(mine, matrix, draw)
        try:
            expected, peer_position = _run(theirs, matrix, draw)
            again = [
                _run(p, matrix[:, order], draw)[0].vector[order.argsort()]
                for p, order in zip(permuted, orders, strict=True)
            ]
        except ValueError as error:
            _exclude(method, actual, f"torchjd raises {error}", cell, outcome)
            return
        if not torch.equal(position, peer_position):
            outcome.failures.append(f"{cell}: other random draws")
        reason = _doubt(method, expected, again)
        if reason:
            # What a method remembers from here on is not comparable either.
            _exclude(method, actual, reason, cell, outcome)
            return
        difference = _difference(method, actual.vector, expected)
        outcome.compared += 1
        outcome.largest[dtype] = max(outcome.largest[dtype], difference)
        if not difference <= _of(dtype, method.limits) or actual.vector.dtype != dtype:
            outcome.failures.append(f"{cell}: differs by {difference:.1e}")
        _check_condition(method, actual, cell, outcome)


def _of(dtype: torch.dtype, limits: tuple[float, float]) -> float:
    return limits[DTYPES.index(dtype)]


def _difference(method: Method, actual: Tensor, expected: Call) -> float:
    length, norm = float(expected.vector.norm()), float(expected.matrix.norm())
    # A vector this short is zero.
    size = length + norm if method.of_matrix else max(length, torch.finfo(actual.dtype).eps * norm)
    difference = method.measure(actual.double()) - method.measure(expected.vector.double())
    return float(difference.norm()) / size if size > 0.0 else float(difference.norm())


def _doubt(method: Method, expected: Call, again: list[Tensor]) -> str:
    """Why torchjd's result is not one to compare with, or nothing."""
    disagreement = max((_difference(method, vector, expected) for vector in again), default=0.0)
    if not disagreement <= _of(expected.dtype, method.limits) / 10.0:
        return f"torchjd differs from itself by {disagreement:.1e}"
    if method.condition is not None:
        error = method.condition(expected)
        if not error <= _of(expected.dtype, method.peer_limits):
            return f"torchjd misses the paper's condition by {error:.1e}"
    return ""


def _exclude(method: Method, actual: Call, reason: str, cell: str, outcome: Outcome) -> None:
    outcome.exclusions.append(Exclusion(cell, reason))
    if method.condition is None:
        outcome.failures.append(f"{cell}: {reason}, and there is no condition to check")
        return
    _check_condition(method, actual, f"{cell}: {reason}", outcome)


def _check_condition(method: Method, actual: Call, cell: str, outcome: Outcome) -> None:
    if method.condition is None:
        return
    error = method.condition(actual)
    if not error <= _of(actual.dtype, method.condition_limits):
        outcome.failures.append(f"{cell}; ours misses the condition by {error:.1e}")


def _run(aggregator: nn.Module, matrix: Tensor, seed: int) -> tuple[Call, Tensor]:
    """The result, and where the random generator stands afterwards."""
    seen: list[Tensor] = []
    weighting = getattr(aggregator, "weighting", None)
    handle = None
    if isinstance(weighting, nn.Module):
        handle = weighting.register_forward_hook(lambda *args: seen.append(args[-1].double()))
    is_ours = type(aggregator).__module__.startswith("jddist")
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        if not is_ours:
            warnings.simplefilter("ignore")
        vector = aggregator(matrix)
    if handle is not None:
        handle.remove()
    weights = seen[0] if seen else None
    call = Call(matrix.double(), weights, vector, matrix.dtype, is_ours)
    return call, torch.random.get_rng_state()
