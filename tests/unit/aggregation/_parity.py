"""Comparing a method with torchjd's, cell by cell.

A cell is a method, a kind of matrix, its number of rows, a dtype and a seed. Every call in it is
either compared or, where torchjd gives no answer to compare with, excluded:

- it raises an error,
- it disagrees with itself by more than a tenth of the tolerance when the columns of the Jacobian
  are permuted (the problem is ill-conditioned), or
- it misses the condition that the paper states for the solution.

An excluded call must meet the paper's condition instead. Nothing is left unchecked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import jddist.aggregation as ours
from tests.unit.aggregation._matrices import KINDS, make_matrix

DTYPES = (torch.float64, torch.float32)
SIZES = (1, 2, 4, 7)
SEEDS = range(3)


@dataclass(frozen=True, eq=False)
class Call:
    """One result: the Jacobian in float64, the weights if the method has any, and the vector."""

    matrix: Tensor
    weights: Tensor | None
    vector: Tensor
    dtype: torch.dtype

    @property
    def gramian(self) -> Tensor:
        return self.matrix @ self.matrix.T


@dataclass(frozen=True, eq=False)
class Method:
    """A method with parameters, and what counts as the same result.

    Attributes:
        label: Its name in the table.
        name: The name of the aggregator in both packages.
        double: Largest relative difference of the vectors in float64.
        single: The same in float32.
        why: The reason for these two.
        parameters: Of the aggregator, given the number of rows.
        peer_parameters: The same for torchjd, where they differ.
        calls: How often an instance is called in a cell, given its kind.
        sizes: Numbers of rows.
        measure: What of the vector is compared.
        condition: How far a call is from the paper's condition; None if no cell may be excluded.
        double_condition: Largest value of `condition` in float64.
        single_condition: The same in float32.
        peer_must_meet: Whether calls where torchjd misses the condition are excluded.
    """

    label: str
    name: str
    double: float
    single: float
    why: str
    parameters: Callable[[int], Mapping[str, Any]] = lambda m: {}
    peer_parameters: Callable[[int], Mapping[str, Any]] | None = None
    calls: Callable[[str], int] = lambda kind: 3
    sizes: Sequence[int] = SIZES
    measure: Callable[[Tensor], Tensor] = lambda vector: vector
    condition: Callable[[Call], float] | None = None
    double_condition: float = 0.0
    single_condition: float = 0.0
    peer_must_meet: bool = False

    def limit(self, dtype: torch.dtype) -> float:
        return self.double if dtype == torch.float64 else self.single

    def condition_limit(self, dtype: torch.dtype) -> float:
        return self.double_condition if dtype == torch.float64 else self.single_condition

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
            for seed in SEEDS:
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
        differences = " ".join(f"{outcome.largest[dtype]:9.1e}" for dtype in DTYPES)
        counts = f"{outcome.compared:8} {len(outcome.exclusions):8}"
        failed = f"  {len(outcome.failures)} FAILED" if outcome.failures else ""
        lines.append(f"{method.label:24} {counts} {differences}{failed}")
    return "\n".join(lines)


def _compare_cell(
    method: Method, kind: str, m: int, dtype: torch.dtype, seed: int, outcome: Outcome
) -> None:
    matrix = make_matrix(kind, m, seed).to(dtype)
    order = torch.randperm(matrix.shape[1], generator=torch.Generator().manual_seed(seed))
    mine, theirs, permuted = method.make_mine(m), method.make_peer(m), method.make_peer(m)
    for k in range(method.calls(kind)):
        cell = f"{method.label}, {kind}, m={m}, {str(dtype).removeprefix('torch.')}, {seed=}, {k=}"
        draw = 10 * seed + k
        actual, position = _run(mine, matrix, draw)
        try:
            expected, peer_position = _run(theirs, matrix, draw)
            again, _ = _run(permuted, matrix[:, order], draw)
        except ValueError as error:
            _exclude(method, actual, f"torchjd raises {error}", cell, outcome)
            return
        if not torch.equal(position, peer_position):
            outcome.failures.append(f"{cell}: other random draws")
        size = max(float(expected.vector.norm()), torch.finfo(dtype).eps * float(matrix.norm()))
        reason = _reason(method, expected, again.vector[order.argsort()], size)
        if reason:
            # What a method remembers from here on is not comparable either.
            _exclude(method, actual, reason, cell, outcome)
            return
        difference = _difference(method, actual.vector, expected.vector, size)
        outcome.compared += 1
        outcome.largest[dtype] = max(outcome.largest[dtype], difference)
        if not difference <= method.limit(dtype) or actual.vector.dtype != expected.vector.dtype:
            outcome.failures.append(f"{cell}: differs by {difference:.1e}")


def _difference(method: Method, actual: Tensor, expected: Tensor, size: float) -> float:
    difference = method.measure(actual.double()) - method.measure(expected.double())
    return float(difference.norm()) / size if size > 0.0 else float(difference.norm())


def _reason(method: Method, expected: Call, again: Tensor, size: float) -> str:
    """Why torchjd's result cannot be compared with, or nothing."""
    doubt = _difference(method, again, expected.vector, size)
    if not doubt <= method.limit(expected.dtype) / 10.0:
        return f"torchjd differs from itself by {doubt:.1e}"
    if method.peer_must_meet and method.condition is not None:
        error = method.condition(expected)
        if not error <= method.condition_limit(expected.dtype):
            return f"torchjd misses the paper's condition by {error:.1e}"
    return ""


def _exclude(method: Method, actual: Call, reason: str, cell: str, outcome: Outcome) -> None:
    outcome.exclusions.append(Exclusion(cell, reason))
    if method.condition is None:
        outcome.failures.append(f"{cell}: {reason}, and there is no condition to check")
        return
    error = method.condition(actual)
    if not error <= method.condition_limit(actual.dtype):
        outcome.failures.append(f"{cell}: {reason}; ours misses the condition by {error:.1e}")


def _run(aggregator: nn.Module, matrix: Tensor, seed: int) -> tuple[Call, Tensor]:
    """The result, and where the random generator stands afterwards."""
    seen: list[Tensor] = []
    weighting = getattr(aggregator, "weighting", None)
    handle = None
    if isinstance(weighting, nn.Module):
        handle = weighting.register_forward_hook(lambda *args: seen.append(args[-1].double()))
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        if not type(aggregator).__module__.startswith("jddist"):
            warnings.simplefilter("ignore")
        vector = aggregator(matrix)
    if handle is not None:
        handle.remove()
    call = Call(matrix.double(), seen[0] if seen else None, vector, matrix.dtype)
    return call, torch.random.get_rng_state()
