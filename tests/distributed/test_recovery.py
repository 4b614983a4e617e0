"""Steps that fail or are skipped leave nothing behind that spoils the next one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Shard

from jddist import attach
from jddist.aggregation import UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autojac import backward
from jddist.errors import NonFiniteObjectiveError, RankError
from tests._oracle import jacobian, relative_error
from tests._ranks import run_ranks
from tests.distributed._spy import spying
from tests.distributed._training import LOSSES, flatten, local_part, make_data, make_network, wrap

BOUND = 1e-10


def _skip_under_accumulation(rank: int, world_size: int) -> Tensor:
    model = make_network()
    ddp = wrap(model)
    engine = Engine(ddp, batch_dim=0, nonfinite="skip")
    x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())
    with ddp.no_sync():
        engine.backward(LOSSES["instance"](ddp(x), y), UPGradWeighting())
    losses = LOSSES["instance"](ddp(x), y)
    with pytest.warns(UserWarning, match="weights of this step are zero"):
        engine.backward(losses * float("nan") if rank == 1 else losses, UPGradWeighting())
    return flatten([p.grad for p in model.parameters()])


def test_a_skipped_step_still_reduces_the_micro_steps_before_it() -> None:
    model, (x, y) = make_network(), make_data()
    rows = jacobian(LOSSES["instance"](model(x), y), model.parameters())
    expected = UPGradWeighting()(rows @ rows.T) @ rows
    ranks = run_ranks(_skip_under_accumulation, 2)
    for found in ranks:
        assert relative_error(found, expected) <= BOUND
        assert torch.equal(found, ranks[0])


def _fail_and_go_on(rank: int, world_size: int) -> Tensor:
    model = make_network()
    ddp = wrap(model)
    attach(ddp, objectives=Shard(0))
    x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())
    with pytest.raises(RankError):
        backward(LOSSES["instance"](ddp(x), y), UPGrad(), parallel_chunk_size=-1 if rank else None)
    losses = LOSSES["instance"](ddp(x), y)
    with pytest.raises(NonFiniteObjectiveError):
        backward(losses * float("nan") if rank else losses, UPGrad())
    backward(LOSSES["instance"](ddp(x), y), UPGrad())
    return flatten([p.grad for p in model.parameters()])


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_failed_backward_leaves_no_rows_behind(world_size: int) -> None:
    model, (x, y) = make_network(), make_data()
    rows = jacobian(LOSSES["instance"](model(x), y), model.parameters())
    for found in run_ranks(_fail_and_go_on, world_size):
        assert relative_error(found, UPGrad()(rows)) <= BOUND


COUNTS = torch.tensor([[1, 0, 2, 1], [3, 1, 0, 2]])  # of [2, 4] objectives, on rank 0


def _counted(rank: int, world_size: int) -> Tensor:
    model = make_network()
    engine = Engine(wrap(model), batch_dim=1, objectives=Partial("avg"))
    x, _ = make_data()
    out = model(x[4 * rank : 4 * rank + 4]).pow(2)
    count = COUNTS if rank == 0 else COUNTS.flip(0)
    return engine.compute_gramian(out.T[:2], count=count)


def test_counts_have_the_order_of_the_objectives() -> None:
    model, (x, _) = make_network(), make_data()
    parts = [model(x[4 * r : 4 * r + 4]).pow(2).T[:2] for r in range(2)]
    counts = [COUNTS.double(), COUNTS.flip(0).double()]
    total = counts[0] + counts[1]
    losses = sum(c * p for c, p in zip(counts, parts, strict=True)) / total
    rows = jacobian(losses, model.parameters())
    expected = (rows @ rows.T).view(2, 4, 2, 4).permute(0, 1, 3, 2)
    for found in run_ranks(_counted, 2):
        assert relative_error(found, expected) <= BOUND


def _frozen(rank: int, world_size: int) -> list[tuple[str, float]]:
    model = make_network()
    model.twice.requires_grad_(False)
    engine = Engine(wrap(model), batch_dim=None)
    losses = LOSSES["task"](model(make_data()[0]), make_data()[1])
    with spying(rank, world_size) as log:
        engine.compute_gramian(losses)
    return [entry for entry in log if entry[0] == "reduce_scatter"]


def test_frozen_parameters_do_not_travel() -> None:
    n = sum(p.numel() for p in make_network().parameters()) - (6 * 6 + 6)
    padded = -(-n // 2) * 2
    for found in run_ranks(_frozen, 2):
        assert found == [("reduce_scatter", 0.5 * 4 * padded * 8)]
