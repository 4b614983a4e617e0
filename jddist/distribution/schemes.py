"""The schemes of exchange, each with what it sends, computes and holds. Pure: shapes alone count.

W ranks have b_r samples of k objectives each; M = k * sum(b_r). A layer's factors are a [b, t, in]
and g [b, k, t, out].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from jddist.autogram.blocks.cost import matched_flops, materialised_flops, pairwise_flops

# The share of a square that is computed, its upper triangle left out in bands, times the factor by
# which a skinny product is slower than a square one.
_SQUARE = 0.75 * 1.25
# Operations for each element of a product that is packed, sent and multiplied.
_PER_ELEMENT = 12.0


class Scheme(Enum):
    """How the products between the rows of different ranks are obtained."""

    NOTHING = "nothing"
    """No rank has rows for the parameter."""
    FACTORS = "factors"
    """Every rank sends its factors to half of the others: each pair of ranks is computed once."""
    FEATURES = "features"
    """The factors go all-to-all into shards of their features; the small Grams of both are
    reduce-scattered, and each rank multiplies its part of them. For t = 1."""
    ROWS = "rows"
    """The rows go all-to-all into column shards, whose Gramians are summed."""
    SUMS = "sums"
    """Estimates of the same rows are reduce-scattered into column shards."""


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


@dataclass(frozen=True, eq=False)
class Step:
    """The exchange of one block: one parameter, a weight with its bias, or several in one message.

    Attributes:
        parameters: Indices of the parameters.
        scheme: The scheme.
        widths: The number of columns of each parameter.
        elements: The numbers that each rank sends: [W].
        flops: What each rank computes, from the factors on: [W].
        memory: The numbers that each rank holds for it, besides its own factors: [W].
        lengths: For FACTORS, the numbers that each rank contributes: [W].
        positions: For FACTORS, each rank's t, or number of entries: [W].
        in_features: For FACTORS and FEATURES, the width of ``a``.
        out_features: For FACTORS and FEATURES, the width of ``g``.
        ones: For FACTORS and FEATURES, whether the columns of a bias are among them.
        kind: For FACTORS, the kind of the blocks.
        turn: For FACTORS, which of two opposite ranks computes their pair, 0 the lower one.
    """

    parameters: tuple[int, ...]
    scheme: Scheme
    widths: tuple[int, ...]
    elements: Tensor
    flops: Tensor
    memory: Tensor
    lengths: Tensor | None = None
    positions: Tensor | None = None
    in_features: int = 0
    out_features: int = 0
    ones: bool = False
    kind: str = "outer"
    turn: int = 0

    @property
    def num_columns(self) -> int:
        """The number of columns of all its parameters."""
        return sum(self.widths)


@dataclass(frozen=True, eq=False)
class Batches:
    """The ranks in groups of equal ones, so that thousands of them are planned as fast as a few.

    Attributes:
        batch: b of each rank: [W].
        group: The group of each rank: [W].
        groups: For each group, its b and what it has for each parameter.
        objectives: k.
    """

    batch: Tensor
    group: Tensor
    groups: tuple[tuple[int, Sequence[BlockShape]], ...]
    objectives: int

    @staticmethod
    def of(
        shapes: Sequence[Sequence[BlockShape]], batches: Sequence[int], objectives: int
    ) -> Batches:
        """Groups the ranks."""
        known: dict[tuple[int, Sequence[BlockShape]], int] = {}
        # The same object, as in [shapes] * W, need not be looked at again.
        seen: dict[tuple[int, int], int] = {}
        group = []
        for of_rank, batch in zip(shapes, batches, strict=True):
            identity = (id(of_rank), batch)
            if identity not in seen:
                seen[identity] = known.setdefault((batch, tuple(of_rank)), len(known))
            group.append(seen[identity])
        batch_sizes = torch.tensor(batches, dtype=torch.float64)
        return Batches(batch_sizes, torch.tensor(group), tuple(known), objectives)

    @property
    def size(self) -> int:
        """The number of ranks W."""
        return len(self.batch)

    @property
    def samples(self) -> int:
        """The samples of all ranks."""
        return int(self.batch.sum())

    @property
    def num_rows(self) -> int:
        """The objectives of all ranks."""
        return self.objectives * self.samples

    @property
    def num_parameters(self) -> int:
        """The number of parameters."""
        return len(self.groups[0][1])

    def shapes_of(self, parameter: int) -> list[BlockShape]:
        """What each group has for a parameter."""
        return [shapes[parameter] for _, shapes in self.groups]

    def spread(self, of_groups: Sequence[float]) -> Tensor:
        """From a number for each group to one for each rank: [W]."""
        return torch.tensor(of_groups, dtype=torch.float64)[self.group]


def candidates(
    ranks: Batches, parameters: tuple[int, ...], columns: Sequence[int], turn: int = 0
) -> list[Step]:
    """The schemes that can serve a parameter, or a weight with its bias.

    Args:
        ranks: The ranks and what they have.
        parameters: Indices of the parameters.
        columns: The number of elements of each parameter.
        turn: Which of two opposite ranks would compute their pair.
    """
    shapes = ranks.shapes_of(parameters[0])
    present = [shape for shape in shapes if shape.kind != "none"]
    if not present:
        zero = torch.zeros(ranks.size, dtype=torch.float64)
        widths = tuple(columns[i] for i in parameters)
        return [Step(parameters, Scheme.NOTHING, widths, zero, zero, zero)]
    found = []
    if len(parameters) == 1:
        found.append(rows_step(ranks, parameters, columns))
    features = {(s.kind, s.in_features, s.out_features) for s in present}
    if len(features) > 1 or present[0].kind == "dense":
        return found
    found.append(_factors_step(ranks, parameters, columns, present[0], turn))
    one_position = all(
        b == 0 or shape.kind == "none" or shape.positions == 1
        for (b, _), shape in zip(ranks.groups, shapes, strict=True)
    )
    if present[0].kind == "outer" and one_position and present[0].in_features:
        found.append(_features_step(ranks, parameters, columns, present[0]))
    return found


def shard_widths(total: int, size: int) -> Tensor:
    """How many of ``total`` columns each of ``size`` ranks has: the first ones full, [W]."""
    width = -(-total // size)
    starts = torch.arange(size, dtype=torch.float64) * width
    return (total - starts).clamp(0, width)


def partners_of(rank: int, size: int, turn: int) -> list[int]:
    """The other ranks whose products with ``rank`` this rank computes: each pair is done once.

    Args:
        rank: A rank.
        size: The number of ranks.
        turn: 0 or 1: whether the lower or the upper one of two opposite ranks computes their pair.
    """
    partners = [(rank + d) % size for d in range(1, (size + 1) // 2)]
    if size % 2 == 0 and (rank >= size // 2) == bool(turn):
        partners.append((rank + size // 2) % size)
    return partners


def receivers_of(rank: int, size: int, turn: int) -> list[int]:
    """The ranks that need this rank's factors: those whose partner it is."""
    receivers = [(rank - d) % size for d in range(1, (size + 1) // 2)]
    if size % 2 == 0 and (rank >= size // 2) != bool(turn):
        receivers.append((rank + size // 2) % size)
    return receivers


def rows_step(ranks: Batches, parameters: tuple[int, ...], columns: Sequence[int]) -> Step:
    """The rows of some parameters, in one message."""
    widths = tuple(columns[i] for i in parameters)
    mine = shard_widths(sum(widths), ranks.size)
    counts = ranks.objectives * ranks.batch
    flops = 2.0 * _SQUARE * ranks.num_rows**2 * mine
    for index in parameters:
        flops = flops + ranks.spread(
            [forming_flops(b, ranks.objectives, shapes[index]) for b, shapes in ranks.groups]
        )
    return Step(
        parameters,
        Scheme.ROWS,
        widths,
        elements=counts * (sum(widths) - mine),
        flops=flops,
        memory=2 * counts * sum(widths) + ranks.num_rows * mine,
    )


def summed_step(
    parameters: tuple[int, ...], columns: Sequence[int], num_rows: int, size: int
) -> Step:
    """Estimates of the same rows of some parameters, in one message."""
    widths = tuple(columns[i] for i in parameters)
    total, mine = sum(widths), shard_widths(sum(widths), size)
    padded = -(-total // size) * size
    sent = torch.full((size,), float((size - 1) * num_rows * (padded // size)), dtype=torch.float64)
    return Step(
        parameters,
        Scheme.SUMS,
        widths,
        elements=sent,
        flops=2.0 * _SQUARE * num_rows**2 * mine,
        memory=num_rows * (total + padded + mine),
    )


def _factors_step(
    ranks: Batches,
    parameters: tuple[int, ...],
    columns: Sequence[int],
    shape: BlockShape,
    turn: int,
) -> Step:
    k, in_, out = ranks.objectives, shape.in_features, shape.out_features
    positions = ranks.spread([float(s.positions) for s in ranks.shapes_of(parameters[0])])
    lookup = shape.kind == "lookup"
    # An entry of a lookup block is a sample, a line and the gradients at that line.
    lines = positions if lookup else ranks.batch * positions
    lengths = lines * (2 + k * in_ if lookup else in_ + k * out)
    receivers = _receivers(ranks.size, turn)
    partner_lines = _over_partners(lines, turn)
    partner_batch = _over_partners(ranks.batch, turn)
    if lookup:
        # As if the lines that samples read were drawn evenly.
        each = matched_flops(1, k, in_) / max(1, out)
        flops = lines * (lines / 2 + partner_lines) * each
    else:
        dims = (k, max(1, in_), out)
        own = ranks.spread([_own(b, shapes[parameters[0]], k) for b, shapes in ranks.groups])
        product = materialised_flops(1, 0, 1, 0, *dims)
        forming = materialised_flops(1, 1, 1, 0, *dims) - product
        pairs = lines * partner_lines * pairwise_flops(1, 1, 1, 1, *dims)
        # Rows that are formed for the own Gramian serve the products with the partners' too.
        twice = ranks.spread(
            [_own_by_pairs(b, shapes[parameters[0]], k) for b, shapes in ranks.groups]
        )
        twice = twice * (partner_lines > 0)
        materialised = (lines * twice + partner_lines) * forming
        materialised = materialised + ranks.batch * partner_batch * product
        flops = own + torch.minimum(pairs, materialised)
    return Step(
        parameters,
        Scheme.FACTORS,
        tuple(columns[i] for i in parameters),
        elements=receivers * lengths,
        flops=flops,
        memory=receivers * lengths + 2 * _over_partners(lengths, turn),
        lengths=lengths,
        positions=positions,
        in_features=in_,
        out_features=out,
        ones=shape.kind == "outer" and (in_ == 0 or len(parameters) == 2),
        kind=shape.kind,
        turn=turn,
    )


def _features_step(
    ranks: Batches, parameters: tuple[int, ...], columns: Sequence[int], shape: BlockShape
) -> Step:
    k, size, in_, out = ranks.objectives, ranks.size, shape.in_features, shape.out_features
    in_mine, out_mine = shard_widths(in_, size), shard_widths(out, size)
    pairs = ranks.samples * (ranks.samples + 1) // 2
    chunk = -(-pairs // size) * (1 + k * k)
    squares = ranks.samples**2 * (in_mine + k * k * out_mine)
    return Step(
        parameters,
        Scheme.FEATURES,
        tuple(columns[i] for i in parameters),
        elements=ranks.batch * (in_ - in_mine + k * (out - out_mine)) + (size - 1) * chunk,
        flops=2.0 * _SQUARE * squares + _PER_ELEMENT * size * chunk,
        memory=(
            ranks.batch * (in_ + k * out)
            + ranks.samples * (in_mine + k * out_mine)
            + 2.0 * size * chunk
        ),
        in_features=in_,
        out_features=out,
        ones=len(parameters) == 2,
    )


def _own(batch: int, shape: BlockShape, k: int) -> float:
    """What a rank's own Gramian of an outer block costs."""
    if shape.kind == "none":
        return 0.0
    sizes = (batch, shape.positions, batch, shape.positions)
    dims = (k, max(1, shape.in_features), shape.out_features)
    return min(pairwise_flops(*sizes, *dims, own=True), materialised_flops(*sizes, *dims, own=True))


def _own_by_pairs(batch: int, shape: BlockShape, k: int) -> float:
    """1 if a rank's own Gramian of an outer block is made without its rows, else 0."""
    if shape.kind == "none":
        return 0.0
    sizes = (batch, shape.positions, batch, shape.positions)
    dims = (k, max(1, shape.in_features), shape.out_features)
    pairs = pairwise_flops(*sizes, *dims, own=True)
    return float(pairs <= materialised_flops(*sizes, *dims, own=True))


def forming_flops(batch: int, k: int, shape: BlockShape) -> float:
    """What it costs a rank to form its rows."""
    if shape.kind == "outer":
        matrix = max(1, shape.in_features) * shape.out_features
        return 2.0 * k * batch * shape.positions * matrix
    if shape.kind == "lookup":
        return float(k * shape.in_features) * (shape.positions + batch * shape.out_features)
    return 0.0


def _receivers(size: int, turn: int) -> Tensor:
    """The number of ranks that each rank sends its factors to: [W]."""
    numbers = torch.full((size,), (size - 1) // 2, dtype=torch.float64)
    if size % 2 == 0:
        upper = torch.arange(size) >= size // 2
        numbers += (upper != bool(turn)).double()
    return numbers


def _over_partners(values: Tensor, turn: int) -> Tensor:
    """For each rank the sum of ``values`` [W] over its partners: [W]."""
    size = len(values)
    if size == 1:
        return torch.zeros_like(values)
    each = (size - 1) // 2
    sums = torch.cat([values, values]).cumsum(0)
    total = sums[each : each + size] - sums[:size]
    if size % 2 == 0:
        upper = torch.arange(size) >= size // 2
        opposite = values.roll(size // 2)
        total = total + torch.where(upper == bool(turn), opposite, torch.zeros_like(opposite))
    return total
