"""Aggregators on column shards: the concatenated results are those of the whole Jacobian."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from jddist.aggregation import (
    IMTLG,
    MGDA,
    PCD,
    Aggregator,
    AlignedMTL,
    CAGrad,
    ConFIG,
    Constant,
    DualProj,
    ExcessMTL,
    FairGrad,
    GradVac,
    GramianWeightedAggregator,
    Krum,
    Mean,
    MoCo,
    NashMTL,
    PCGrad,
    Random,
    RandomWeighting,
    Sum,
    TrimmedMean,
    UPGrad,
)
from jddist.aggregation._columns import Columns, WholeColumns, acting_on, current_columns, overlap
from tests.unit.aggregation._matrices import make_matrix

TIMEOUT_S = 10.0


class Meeting:
    """Where the shards' threads add up and share; a shard that stays away breaks the barrier."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self.parts: dict[int, Tensor] = {}
        self.runs = 0

    def exchange(self, rank: int, part: Tensor) -> list[Tensor]:
        self.parts[rank] = part
        self.barrier.wait()
        parts = [self.parts[r] for r in sorted(self.parts)]
        self.barrier.wait()
        return parts


class Shard(Columns):
    """One thread's columns."""

    def __init__(self, rank: int, meeting: Meeting, sizes: list[int]) -> None:
        self.rank, self.meeting, self.sizes = rank, meeting, sizes

    def total(self, width: int) -> int:
        assert width == self.sizes[self.rank]
        return sum(self.sizes)

    def among(self, width: int, first: int, last: int) -> tuple[slice, slice | Tensor]:
        start = sum(self.sizes[: self.rank])
        return overlap(start, start + width, first, last)

    def sum(self, partial: Tensor) -> Tensor:
        return torch.stack(self.meeting.exchange(self.rank, partial)).sum(dim=0)

    def weigh(self, weighting: Callable[[Tensor], Tensor], statistic: Tensor) -> Tensor:
        weights = torch.empty(0)
        if self.rank == 0:
            self.meeting.runs += 1
            weights = weighting(statistic)
        return self.meeting.exchange(self.rank, weights)[0]

    def pack(self, columns: Tensor) -> Tensor:
        return torch.cat(self.meeting.exchange(self.rank, columns), dim=1)

    def unpack(self, packed: Tensor) -> Tensor:
        return packed.split(self.sizes, dim=1)[self.rank].clone()


def on_shards(
    aggregator: Aggregator, matrix: Tensor, sizes: list[int]
) -> tuple[list[Tensor], Meeting]:
    meeting = Meeting(len(sizes))

    def act(rank: int, columns: Tensor, mine: Aggregator) -> Tensor:
        with acting_on(Shard(rank, meeting, sizes)):
            return mine(columns)

    jobs = [(r, c, deepcopy(aggregator)) for r, c in enumerate(matrix.split(sizes, dim=1))]
    with ThreadPoolExecutor(len(sizes)) as pool:
        return list(pool.map(lambda job: act(*job), jobs)), meeting


AGGREGATORS = [
    UPGrad(),
    DualProj(torch.tensor([1.0, 2.0, 0.0, 1.0])),
    MGDA(),
    PCGrad(),
    GradVac(),
    AlignedMTL(),
    CAGrad(0.5),
    ConFIG(),
    FairGrad(2.0),
    IMTLG(),
    Krum(0),
    NashMTL(4),
    PCD(),
    Mean(),
    Sum(),
    Constant(torch.arange(4.0)),
    Random(),
    GramianWeightedAggregator(RandomWeighting()),
    TrimmedMean(1),
    ExcessMTL(),
    MoCo(),
]


@pytest.mark.parametrize("sizes", [[6, 5], [11, 0], [1, 4, 6]], ids=str)
@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=str)
def test_shards_agree_with_the_whole(aggregator: Aggregator, sizes: list[int]) -> None:
    matrix = make_matrix("conflicting", 4, seed=0)
    torch.manual_seed(0)
    expected = deepcopy(aggregator)(matrix)
    torch.manual_seed(0)
    results, _ = on_shards(aggregator, matrix, sizes)
    assert [len(r) for r in results] == sizes
    # Only the order of the sums in G differs.
    assert_close(torch.cat(results), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("aggregator", [UPGrad(), Random()], ids=str)
def test_weights_come_from_one_run(aggregator: Aggregator) -> None:
    _, meeting = on_shards(aggregator, make_matrix("random", 3, seed=0), [4, 4, 3])
    assert meeting.runs == 1


@pytest.mark.parametrize("aggregator", [Mean(), Sum(), Constant(torch.ones(3))], ids=str)
def test_row_counts_need_no_exchange(aggregator: Aggregator) -> None:
    matrix = make_matrix("random", 3, seed=0)

    class Silent(WholeColumns):
        def sum(self, partial: Tensor) -> Tensor:
            raise AssertionError("nothing to add up")

    with acting_on(Silent()):
        assert_close(aggregator(matrix[:, :4]), aggregator(matrix)[:4])


def test_gramian_is_added_up() -> None:
    matrix = make_matrix("conflicting", 3, seed=0)
    expected = UPGrad()(matrix)

    class KnownRest(WholeColumns):
        def sum(self, partial: Tensor) -> Tensor:
            return partial + matrix[:, 4:] @ matrix[:, 4:].T

    with acting_on(KnownRest()):
        assert_close(UPGrad()(matrix[:, :4]), expected[:4])


def test_whole_columns_return_after_the_context_even_on_errors() -> None:
    columns = WholeColumns()
    with pytest.raises(RuntimeError, match="inside"), acting_on(columns):
        assert current_columns() is columns
        raise RuntimeError("inside")
    assert current_columns() is not columns
    assert isinstance(current_columns(), WholeColumns)
