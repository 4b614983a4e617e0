"""What travels between ranks is what the plan says: factors or rows, and nothing more.

The expected numbers are formulas written out here, not the planner's own code.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jddist import attach
from jddist.aggregation import UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autogram.rules import fallback
from jddist.autojac import jac_to_grad, mtl_backward
from tests._ranks import run_ranks
from tests.distributed._spy import spying
from tests.distributed._training import wrap

FLOAT = 8  # bytes of a float64
IN, HIDDEN, OUT = 40, 30, 20  # wide against the batch: factors are far smaller than rows
BATCH = 6  # on each rank


def _network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(IN, HIDDEN), nn.Tanh(), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, OUT)]
    return nn.Sequential(*layers).double()


def _sample(rank: int, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(batch, IN, generator=generator, dtype=torch.float64)


def _instance_wise(rank: int, world_size: int) -> dict[str, list]:
    ddp = wrap(_network())
    engine = Engine(ddp, batch_dim=0, prefer="bytes")
    logs = []
    entered = []
    original = fallback.vjp_rows
    for _ in range(2):  # the second step's handshake finds its contents known
        losses = ddp(_sample(rank)).pow(2).sum(dim=1)
        with spying(rank, world_size) as log, pytest.MonkeyPatch.context() as monkeypatch:

            def spied(record, paths):  # type: ignore[no-untyped-def]
                entered.append(type(record.module).__name__)
                return original(record, paths)

            monkeypatch.setattr("jddist.autogram.assembly.vjp_rows", spied)
            engine.backward(losses, UPGradWeighting())
        logs.append([(name, sent) for name, sent in log])
    return {"logs": logs, "fallback": entered}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_instance_wise_messages(world_size: int) -> None:
    others, total = world_size - 1, world_size * BATCH
    header = 4 * 8 * others
    # Half of the pairs of ranks; of two opposite ones it is the lower one's turn, then the upper's.
    upper = range(world_size // 2, world_size)
    # The norm's weight and bias go as rows, cut into columns; the first ranks' shards are full.
    norm_columns = 2 * HIDDEN
    gramian = 2 * others / world_size * (total * (total + 1) // 2 + total) * FLOAT
    weights = (2 + total) * FLOAT
    # The gradients are averaged by a message of the engine's own, in place of the reducer's.
    parameters = IN * HIDDEN + HIDDEN + 2 * HIDDEN + HIDDEN * OUT + OUT
    averages = 2 * others / world_size * parameters * FLOAT
    for rank, result in enumerate(run_ranks(_instance_wise, world_size)):
        width = -(-norm_columns // world_size)
        mine = max(0, min(norm_columns, (rank + 1) * width) - min(norm_columns, rank * width))
        rows = BATCH * (norm_columns - mine) * FLOAT
        times = [
            others // 2 + (world_size % 2 == 0 and (rank in upper) == first)
            for first in (True, False)
        ]
        factors = [
            n * BATCH * (in_ + out) * FLOAT
            for n, (in_, out) in zip(times, ((40, 30), (30, 20)), strict=True)
        ]
        first, second = result["logs"]
        assert [name for name, _ in first[:2]] == ["all_gather", "all_gather"]  # the handshake
        assert second == [
            ("all_gather", header),
            ("all_to_all_single", factors[0]),
            ("all_to_all_single", factors[1]),
            ("all_to_all_single", rows),
            ("all_reduce", gramian),
            ("broadcast", weights if rank == 0 else 0),
            ("all_reduce", averages),
        ]
        assert first[2:] == second[1:]
        assert result["fallback"] == []  # every layer has a closed form


def _rows_are_smaller(rank: int, world_size: int) -> list:
    torch.manual_seed(0)
    ddp = wrap(nn.Sequential(nn.Linear(3, 2)).double())
    engine = Engine(ddp, batch_dim=0)
    x = torch.randn(4, 50, 3, dtype=torch.float64)  # 50 positions: a row is smaller than factors
    losses = ddp(x).pow(2).sum(dim=(1, 2))
    with spying(rank, world_size) as log:
        engine.compute_gramian(losses)
    return [(name, sent) for name, sent in log]


@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_travel_where_they_are_smaller(world_size: int) -> None:
    for rank, log in enumerate(run_ranks(_rows_are_smaller, world_size)):
        columns = 3 * 2 + 2
        width = -(-columns // world_size)
        mine = max(0, min(columns, (rank + 1) * width) - min(columns, rank * width))
        exchanged = [entry for entry in log[2:] if entry[0] != "all_reduce"]
        assert exchanged == [("all_to_all_single", 4 * (columns - mine) * FLOAT)]


WORDS, WIDTH, LENGTH, SENTENCES = 500, 6, 40, 3


def _lookup(rank: int, world_size: int) -> list:
    torch.manual_seed(0)
    ddp = wrap(nn.Sequential(nn.Embedding(WORDS, WIDTH)).double())
    engine = Engine(ddp, batch_dim=0)
    # Sample i of each rank reads 10 i + 1 different words, most of them several times.
    tokens = torch.stack([(torch.arange(LENGTH) % (10 * i + 1)) * 7 for i in range(SENTENCES)])
    losses = ddp(tokens).pow(2).sum(dim=(1, 2))
    with spying(rank, world_size) as log:
        engine.compute_gramian(losses)
    return [(name, sent) for name, sent in log]


@pytest.mark.parametrize("world_size", [2, 3])
def test_of_a_table_only_the_lines_that_were_read_travel(world_size: int) -> None:
    assert sum(10 * i + 1 for i in range(SENTENCES)) == 33
    # A sample, a line and the gradients at that line; the number is rounded up to a multiple of 4,
    # an eighth of the power of two below it. One rank of each pair sends them to the other.
    sent = 36 * (2 + WIDTH) * FLOAT
    pairs = world_size * (world_size - 1) // 2
    logs = run_ranks(_lookup, world_size)
    exchanged = [e for log in logs for e in log[2:] if e[0] != "all_reduce"]
    assert {name for name, _ in exchanged} == {"all_to_all_single"}
    assert sum(size for _, size in exchanged) == pairs * sent


def _task_wise(rank: int, world_size: int) -> dict[str, list]:
    ddp = wrap(_network())
    engine = Engine(ddp, batch_dim=None)
    with spying(rank, world_size) as engine_log:
        engine.backward(ddp(_sample(rank)).pow(2).mean(dim=0)[:4], UPGradWeighting())
    attach(ddp)
    features = ddp(_sample(rank))
    losses = [features[:, i].pow(2).mean() for i in range(4)]
    with spying(rank, world_size) as log:
        mtl_backward(losses, features=features)
        jac_to_grad(ddp.parameters(), UPGrad())
    return {"engine": list(engine_log), "autojac": list(log)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_task_wise_messages(world_size: int) -> None:
    others, tasks = world_size - 1, 4
    n = IN * HIDDEN + HIDDEN + 2 * HIDDEN + HIDDEN * OUT + OUT
    padded = -(-n // world_size) * world_size
    scatter = others / world_size * tasks * padded * FLOAT
    flags = world_size * tasks
    halved = 2 * others / world_size * (tasks * (tasks + 1) // 2 + flags) * FLOAT
    gramian = 2 * others / world_size * (tasks * tasks + flags) * FLOAT
    for result in run_ranks(_task_wise, world_size):
        exchanged = [e for e in result["engine"][2:] if e[0] != "broadcast"]
        averages = 2 * others / world_size * n * FLOAT
        assert exchanged == [
            ("reduce_scatter", scatter),
            ("all_reduce", halved),
            ("all_reduce", averages),
        ]
        gathered = others * (padded // world_size) * FLOAT
        own = [e for e in result["autojac"] if e[0] in ("reduce_scatter", "all_reduce")]
        assert own == [("reduce_scatter", scatter), ("all_reduce", gramian)]
        assert result["autojac"][-1] == ("all_gather", gathered)
