"""Which exchange each parameter's rows take between ranks. Pure: no process group is needed.

Bytes are those sent per rank by the ring convention, padding counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Scheme(Enum):
    """How the products between the rows of different ranks are obtained."""

    NOTHING = "nothing"
    """No rank has rows for the parameter."""
    FACTORS = "factors"
    """The factors (a, g) are all-gathered; each rank computes half of its blocks of G."""
    ROWS = "rows"
    """The rows go all-to-all into column shards, whose Gramians are summed."""


@dataclass(frozen=True)
class BlockShape:
    """What a rank says of its block of rows for one parameter.

    Attributes:
        kind: "none", "outer", "lookup" or "dense".
        positions: t, for an outer block; the number of entries of a lookup block, padded.
        in_features: The width of ``a``, 0 for the columns of a bias alone; the width of a table.
        out_features: The width of ``g``; the number of lines of a table.
        shares_grads: Whether the block has the same ``g`` as the previous parameter's.
    """

    kind: str
    positions: int = 0
    in_features: int = 0
    out_features: int = 0
    shares_grads: bool = False


@dataclass(frozen=True)
class Step:
    """The exchange of one block: one parameter, or a weight with its bias.

    Attributes:
        parameters: Indices of the parameters.
        scheme: The scheme chosen.
        columns: The number of columns p.
        lengths: For FACTORS, the numbers that each rank contributes (before padding).
        positions: For FACTORS, each rank's t, or number of entries.
        in_features: For FACTORS, the width of ``a``.
        out_features: For FACTORS, the width of ``g``.
        ones: For FACTORS, whether the columns of a bias are among them.
        kind: For FACTORS, the kind of the blocks.
    """

    parameters: tuple[int, ...]
    scheme: Scheme
    columns: int
    lengths: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    in_features: int = 0
    out_features: int = 0
    ones: bool = False
    kind: str = "outer"

    def elements_sent(self, row_counts: Sequence[int]) -> float:
        """Numbers that the busiest rank sends for this block."""
        size = len(row_counts)
        if self.scheme is Scheme.FACTORS:
            return float((size - 1) * max(self.lengths))
        if self.scheme is Scheme.ROWS:
            return rows_elements(row_counts, self.columns)
        return 0.0


def rows_elements(row_counts: Sequence[int], columns: int) -> float:
    """Numbers that the busiest rank sends when rows go into column shards."""
    size = len(row_counts)
    return (size - 1) / size * max(row_counts) * columns


def plan_exchange(
    shapes: Sequence[Sequence[BlockShape]],
    columns: Sequence[int],
    batches: Sequence[int],
    objectives: int,
) -> list[Step]:
    """The steps of an exchange, in parameter order, the same on every rank.

    Args:
        shapes: For each rank, what it has for each parameter.
        columns: The number of elements of each parameter.
        batches: b of each rank.
        objectives: k.
    """
    steps: list[Step] = []
    index = 0
    while index < len(columns):
        single = _step(shapes, (index,), columns, batches, objectives)
        if _fusable(shapes, index):
            both = _step(shapes, (index, index + 1), columns, batches, objectives)
            if both.scheme is Scheme.FACTORS and single.scheme is Scheme.FACTORS:
                steps.append(both)
                index += 2
                continue
        steps.append(single)
        index += 1
    return steps


def _fusable(shapes: Sequence[Sequence[BlockShape]], index: int) -> bool:
    """Whether, on every rank that has rows, the next parameter is this one's bias."""
    if index + 1 >= len(shapes[0]):
        return False
    any_rows = False
    for of_rank in shapes:
        weight, bias = of_rank[index], of_rank[index + 1]
        if weight.kind == "none" and bias.kind == "none":
            continue
        if weight.kind != "outer" or bias.kind != "outer" or not bias.shares_grads:
            return False
        if weight.in_features == 0 or bias.in_features != 0:
            return False
        any_rows = True
    return any_rows


def _step(
    shapes: Sequence[Sequence[BlockShape]],
    parameters: tuple[int, ...],
    columns: Sequence[int],
    batches: Sequence[int],
    k: int,
) -> Step:
    first = [of_rank[parameters[0]] for of_rank in shapes]
    total = sum(columns[i] for i in parameters)
    present = [shape for shape in first if shape.kind != "none"]
    if not present:
        return Step(parameters, Scheme.NOTHING, total)
    rows = Step(parameters, Scheme.ROWS, total)
    features = {(s.kind, s.in_features, s.out_features) for s in present}
    if any(shape.kind == "dense" for shape in present) or len(features) > 1:
        return rows
    ((kind, in_features, out_features),) = features
    lengths = tuple(
        # An entry of a lookup block is a sample, a line and the gradients at that line.
        s.positions * (2 + k * in_features)
        if kind == "lookup"
        else b * s.positions * (in_features + k * out_features)
        for b, s in zip(batches, first, strict=True)
    )
    factors = Step(
        parameters,
        Scheme.FACTORS,
        total,
        lengths,
        tuple(s.positions for s in first),
        in_features,
        out_features,
        ones=kind == "outer" and (in_features == 0 or len(parameters) == 2),
        kind=kind,
    )
    row_counts = [b * k for b in batches]
    cheaper = factors.elements_sent(row_counts) <= rows.elements_sent(row_counts)
    return factors if cheaper else rows
