"""Column shards of a Jacobian over the ranks of a group, and DTensors that hold them.

Every rank has the columns that DTensor's ``Shard(1)`` gives it: the first ranks' shards are full,
the last ones short or empty.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from jddist.aggregation import Aggregator
from jddist.aggregation._columns import Columns, acting_on, overlap

from .collectives import Group, column_bounds
from .once import Job, run_on_rank_zero


class RankColumns(Columns):
    """This rank's columns.

    Args:
        group: The ranks.
        total: n, the number of columns over all ranks.
    """

    def __init__(self, group: Group, total: int) -> None:
        self._group = group
        self._total = total
        self._start, self._stop = column_bounds(total, group.size)[group.rank]

    def total(self, width: int) -> int:
        return self._total

    def among(self, width: int, first: int, last: int) -> tuple[slice, slice | Tensor]:
        assert width == self._stop - self._start
        return overlap(self._start, self._stop, first, last)

    def sum(self, partial: Tensor) -> Tensor:
        total = self._group.all_reduce(partial.detach().to(torch.float64, copy=True))
        return total.to(partial.dtype)

    def weigh(self, weighting: Callable[[Tensor], Tensor], statistic: Tensor) -> Tensor:
        job = Job(weighting, statistic, statistic.shape[:1])
        return run_on_rank_zero(self._group, [job])[0].to(statistic.dtype)

    def pack(self, columns: Tensor) -> Tensor:
        process_group = self._group.process_group
        if process_group is None or self._group.size == 1:
            return columns
        return DTensor.from_local(
            columns,
            _mesh(process_group, columns.device.type),
            [Shard(1)],
            run_check=False,
            shape=torch.Size([len(columns), self._total]),
            stride=(self._total, 1),
        )

    def unpack(self, packed: Tensor) -> Tensor:
        if not isinstance(packed, DTensor):  # of one process: every rank has all columns
            return packed[:, self._start : self._stop].clone()
        local = packed.to_local()
        group = self._group.process_group
        ranks = None if group is None else get_process_group_ranks(group)
        if packed.device_mesh.mesh.tolist() != ranks or packed.placements != (Shard(1),):
            raise ValueError(
                f"Found a state spread over the ranks {packed.device_mesh.mesh.tolist()} as "
                f"{packed.placements}; expected its columns on the ranks {ranks}. Load the "
                "checkpoint with torch.distributed.checkpoint, after "
                "jddist.autojac.allocate_state on these ranks."
            )
        return local


@cache
def _mesh(process_group: ProcessGroup, device_type: str) -> DeviceMesh:
    """The ranks as a mesh; made from what every rank knows, without sending anything."""
    return DeviceMesh.from_group(process_group, device_type)


@cache
def _group(process_group: ProcessGroup) -> Group:
    """The ranks as a group; making one may itself need all ranks, so it is made once."""
    return Group(process_group)


def check_acts_on_columns(aggregator: Aggregator) -> None:
    """Raises ValueError unless the aggregator can act on column shards."""
    if not aggregator.acts_on_columns:
        raise ValueError(
            f"Found {type(aggregator).__name__} on several ranks; expected an aggregator that can "
            "act on some columns of the Jacobian: a GramianWeightedAggregator, or one with "
            "columnwise = True or acts_on_columns = True. No rank ever holds the whole Jacobian."
        )


def aggregate_dtensor(aggregator: Callable[[Tensor], Tensor], jacobian: Tensor) -> DTensor:
    """Aggregates a Jacobian [m, n] that is a DTensor, each rank its columns.

    Columns (``Shard(1)``) stay where they are. Rows (``Shard(0)``) become columns by an all-to-all,
    ``Partial`` ones by a reduce-scatter, and of a ``Replicate`` one each rank takes its columns.
    The aggregator's hooks see this rank's columns. Autograd does not follow.

    Args:
        aggregator: An Aggregator.
        jacobian: A DTensor on a mesh of one dimension.

    Returns:
        The vector [n]: ``Replicate`` for a Jacobian that is, else ``Shard(0)``.

    Raises:
        ValueError: The aggregator needs all columns, or the placement is none of these. (Or the
            local part is not of the size of DTensor's own cut: that is raised where it is so, and
            ends the other ranks by the group's timeout. Nothing is sent to find out.)
        RankError: A weighting failed on rank 0.
    """
    assert isinstance(aggregator, Aggregator) and isinstance(jacobian, DTensor)
    check_acts_on_columns(aggregator)
    mesh = jacobian.device_mesh
    placement = _only_placement(jacobian)
    group = _group(mesh.get_group())
    m, n = jacobian.shape
    local: Tensor = jacobian.to_local().detach()
    columns = _to_columns(local, placement, group, m, n)
    with acting_on(RankColumns(group, n)), torch.no_grad():
        vector = aggregator(columns)
    if isinstance(placement, Replicate):
        whole = group.gather_columns(vector, n)
        return DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
    return DTensor.from_local(
        vector, mesh, [Shard(0)], run_check=False, shape=torch.Size([n]), stride=(1,)
    )


def _only_placement(jacobian: DTensor) -> Placement:
    placement = jacobian.placements[0]
    known = placement in (Shard(0), Shard(1), Replicate(), Partial("sum"), Partial("avg"))
    # Strided shards are a type of their own, of which some versions say that they equal a Shard.
    known = known and type(placement) in (Shard, Replicate, Partial)
    if jacobian.device_mesh.ndim != 1 or not known:
        raise ValueError(
            f"Found a Jacobian placed as {jacobian.placements} on a mesh of "
            f"{jacobian.device_mesh.ndim} dimensions; expected Shard(1) (or Shard(0), Replicate(), "
            'Partial("sum"), Partial("avg")) on a mesh of one. Redistribute it first.'
        )
    return placement


def _to_columns(local: Tensor, placement: Placement, group: Group, m: int, n: int) -> Tensor:
    """This rank's columns [m, n_r]."""
    row_counts = [stop - start for start, stop in column_bounds(m, group.size)]
    start, stop = column_bounds(n, group.size)[group.rank]
    expected = (m, n)
    if placement == Shard(0):
        expected = (row_counts[group.rank], n)
    elif placement == Shard(1):
        expected = (m, stop - start)
    if local.shape != expected:
        raise ValueError(
            f"Found a local part of shape {tuple(local.shape)} in a Jacobian of shape {(m, n)} "
            f"placed as {placement}; expected {expected} on rank {group.rank}, DTensor's own cut. "
            "Make it with distribute_tensor or full_tensor, not from parts of other sizes."
        )
    if placement == Shard(1):
        return local
    if placement == Shard(0):
        return group.rows_to_columns(local, row_counts)
    if isinstance(placement, Replicate):
        return local[:, start:stop]
    columns = group.reduce_columns(local)
    return columns / group.size if placement == Partial("avg") else columns
