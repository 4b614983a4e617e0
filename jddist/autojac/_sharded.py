"""Aggregation over several ranks: each works on a shard of the Jacobian's columns.

Whatever the placement of the rows, they become column shards [m, n / W]: rows of the ranks' own by
an all-to-all, estimates of the same rows by a reduce-scatter. All groups' Gramians are summed in
one all-reduce; all weightings run on rank 0 with one broadcast, or those of many groups are shared
out over the ranks; every rank combines its columns, and one all-gather brings the gradients
together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import Placement

from jddist._observing import NOBODY, Observers
from jddist._progress import enter
from jddist.aggregation import Aggregator, GramianWeightedAggregator
from jddist.aggregation._columns import acting_on
from jddist.distribution.base import Distribution, is_average, is_sharded
from jddist.distribution.collectives import column_bounds
from jddist.distribution.columns import RankColumns
from jddist.distribution.cut import ColumnCut
from jddist.distribution.once import Job
from jddist.distribution.reorder import ColumnOrder
from jddist.distribution.shared_out import run_shared_out
from jddist.errors import NonFiniteObjectiveError
from jddist.linalg._dealing import is_dealt
from jddist.linalg.gramian import compute_gramian

# How many numbers are looked at at a time.
_CHUNK = 1 << 16


@dataclass(eq=False)
class RowGroup:
    """Rows to aggregate together.

    Attributes:
        rows: This rank's rows [m_r, n].
        row_counts: m_r of each rank.
        placement: Where the rows live.
        aggregator: What aggregates them.
        cut: If the rows are this rank's columns of all rows already: which ones.
        order: If the aggregator needs them in the order of J: how they get there.
        shared_out: Whether any rank may run the weighting for all.
        gramian: That of all ranks' rows, once it is known, if one is formed.
    """

    rows: Tensor
    row_counts: Sequence[int]
    placement: Placement
    aggregator: Aggregator
    cut: ColumnCut | None = None
    order: ColumnOrder | None = None
    shared_out: bool = False
    gramian: Tensor | None = None

    @property
    def total(self) -> int:
        """n: the number of columns over all ranks."""
        return self.rows.shape[1] if self.cut is None else self.cut.total

    @property
    def num_rows(self) -> int:
        """M: the number of rows over all ranks."""
        return sum(self.row_counts) if is_sharded(self.placement) else self.rows.shape[0]


def aggregate(
    groups: Sequence[RowGroup],
    distribution: Distribution,
    call: Callable[[Aggregator, Tensor], tuple[Tensor, Tensor | None]],
    observers: Observers = NOBODY,
) -> list[tuple[Tensor, Tensor | None]]:
    """Aggregates every group over all ranks.

    Args:
        groups: The groups, the same on every rank.
        distribution: The ranks.
        call: Calls an aggregator on a matrix and returns the vector and the weights, if any.
        observers: Who watches.

    Returns:
        For each group the vector [n], identical on all ranks, and the weights [M] or None.

    Raises:
        NonFiniteObjectiveError: A row is NaN or infinite, on any rank.
        RankError: A weighting failed on rank 0.
    """
    enter("exchange")
    finite = [_finite_rows(group.rows) for group in groups]
    shards = [_column_shard(group, distribution) for group in groups]
    gramians = _sum_gramians(groups, shards, finite, distribution)
    observers.gramian_known()
    weights = _weigh(groups, gramians, distribution, observers)
    results: list[tuple[Tensor, Tensor | None]] = []
    for group, shard, gramian, weight in zip(groups, shards, gramians, weights, strict=True):
        group.gramian = gramian
        if group.num_rows == 0:
            results.append((shard.new_zeros(shard.shape[1]), shard.new_zeros(0)))
            continue
        weighs_itself = observers if gramian is None else NOBODY
        weighs_itself.weighs([group.aggregator])
        with acting_on(_Shard(group, distribution, gramian, weight)):
            results.append(_call(group, shard, call))
        weighs_itself.weighed([group.aggregator])
    enter("backward")
    vectors = _gather(groups, [vector for vector, _ in results], distribution)
    return [(vector, w) for vector, (_, w) in zip(vectors, results, strict=True)]


def _call(
    group: RowGroup,
    shard: Tensor,
    call: Callable[[Aggregator, Tensor], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    if group.order is None:
        return call(group.aggregator, shard)
    vector, weights = call(group.aggregator, group.order.to_order(shard))
    return group.order.from_order(vector), weights


class _Shard(RankColumns):
    """A group's columns, with its Gramian and weights where they are known already."""

    def __init__(
        self,
        group: RowGroup,
        distribution: Distribution,
        gramian: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        super().__init__(distribution.columns.group, group.total)
        self._distribution = distribution
        self._cut = group.cut if group.order is None else None
        self._gramian = gramian
        self._weights = weights

    def among(self, width: int, first: int, last: int) -> tuple[slice, slice | Tensor]:
        if self._cut is None:
            return super().among(width, first, last)
        return self._cut.among(first, last)

    def sum(self, partial: Tensor) -> Tensor:
        if self._gramian is None:
            return super().sum(partial)
        assert self._gramian.shape == partial.shape
        return self._gramian.to(partial.dtype)

    def weigh(self, weighting: Callable[[Tensor], Tensor], statistic: Tensor) -> Tensor:
        if self._weights is None:
            job = Job(weighting, statistic, statistic.shape[:1])
            return self._distribution.run_once([job])[0].to(statistic.dtype)
        return self._weights.to(statistic.dtype)


def _finite_rows(rows: Tensor) -> Tensor:
    """For each row whether all of it is finite; never a second matrix of that size."""
    flags = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    for columns in rows.split(max(1, _CHUNK // max(1, len(rows))), dim=1):
        flags &= torch.isfinite(columns).all(dim=1)
    return flags


def _column_shard(group: RowGroup, distribution: Distribution) -> Tensor:
    ranks = distribution.group
    if group.cut is not None:
        return group.rows
    if is_sharded(group.placement):
        return ranks.rows_to_columns(group.rows, group.row_counts)
    columns = ranks.reduce_columns(group.rows)
    return columns / ranks.size if is_average(group.placement) else columns


def _sum_gramians(
    groups: Sequence[RowGroup],
    shards: Sequence[Tensor],
    finite: Sequence[Tensor],
    distribution: Distribution,
) -> list[Tensor | None]:
    """All groups' Gramians, and every rank's flags of finite rows, in one all-reduce."""
    ranks = distribution.columns.group
    pieces, sizes = [], []
    for group, shard, ok in zip(groups, shards, finite, strict=True):
        m = group.num_rows
        flags = torch.zeros(ranks.size, m, dtype=torch.float64, device=shard.device)
        start = sum(group.row_counts[: ranks.rank]) if is_sharded(group.placement) else 0
        flags[ranks.rank, start : start + len(ok)] = (~ok).double()
        gramian = flags.new_empty(0)
        if m and isinstance(group.aggregator, GramianWeightedAggregator):
            gramian = compute_gramian(shard).double()
        pieces += [flags.reshape(-1), gramian.reshape(-1)]
        sizes += [flags.numel(), gramian.numel()]
    parts = ranks.all_reduce(torch.cat(pieces)).split(sizes)
    _check_finite(groups, parts[::2], ranks.size)
    return [
        part.view(group.num_rows, -1) if part.numel() else None
        for group, part in zip(groups, parts[1::2], strict=True)
    ]


def _check_finite(groups: Sequence[RowGroup], flags: Sequence[Tensor], num_ranks: int) -> None:
    bad = {
        (rank, row)
        for group, flag in zip(groups, flags, strict=True)
        for rank, row in flag.view(num_ranks, group.num_rows).nonzero().tolist()
    }
    if bad:
        listed = ", ".join(f"objective {row} (rank {rank})" for rank, row in sorted(bad)[:8])
        raise NonFiniteObjectiveError(
            f"Found NaN or infinity in the rows of {listed}; expected finite rows. No .grad was "
            "written. Lower the learning rate, or look at that rank's data."
        )


def _weigh(
    groups: Sequence[RowGroup],
    gramians: Sequence[Tensor | None],
    distribution: Distribution,
    observers: Observers,
) -> list[Tensor | None]:
    jobs: dict[int, Job] = {}
    shared: list[int] = []
    for i, (group, gramian) in enumerate(zip(groups, gramians, strict=True)):
        if gramian is None or not isinstance(group.aggregator, GramianWeightedAggregator):
            continue
        weighting, shape = group.aggregator.gramian_weighting, gramian.shape[:1]
        dtype = torch.promote_types(group.rows.dtype, torch.float32)
        jobs[i] = Job(weighting, gramian.to(dtype), shape)
        if group.shared_out and not is_dealt(weighting, shape.numel()):
            shared.append(i)
    weightings = [job.weighting for job in jobs.values()]
    observers.weighs(weightings)
    found: dict[int, Tensor] = {}
    if len(shared) > 1 and distribution.everyone.size > 1:
        of_all = run_shared_out(distribution.everyone, [jobs[i] for i in shared])
        found = dict(zip(shared, of_all, strict=True))
    others = [i for i in jobs if i not in found]
    if others:
        of_rank_zero = distribution.run_once([jobs[i] for i in others])
        found |= dict(zip(others, of_rank_zero, strict=True))
    observers.weighed(weightings)
    return [found.get(i) for i in range(len(groups))]


def _gather(
    groups: Sequence[RowGroup], shards: Sequence[Tensor], distribution: Distribution
) -> list[Tensor]:
    """The whole vectors of all groups, in one all-gather; but parts where tensors are cut."""
    ranks = distribution.group
    if any(group.cut is not None for group in groups):
        return list(shards)
    widths = [
        [stop - start for start, stop in column_bounds(group.rows.shape[1], ranks.size)]
        for group in groups
    ]
    lengths = [sum(width[rank] for width in widths) for rank in range(ranks.size)]
    flat = torch.cat(list(shards))
    parts = [
        part.split([width[rank] for width in widths])
        for rank, part in enumerate(ranks.all_gather_uneven(flat, lengths))
    ]
    return [torch.cat([part[i] for part in parts]) for i in range(len(groups))]
