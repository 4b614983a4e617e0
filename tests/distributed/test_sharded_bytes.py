"""What a step on sharded parameters sends: ``fully_shard``'s own messages, and jddist's.

All expected bytes are written out here as formulas: W ranks, s bytes a number, m tasks, n numbers
in all parameters, padded as the wrapper pads them: the first dimension of each to a multiple of W.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jddist import attach
from jddist.aggregation import Aggregator, GradDrop, UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autojac import jac_to_grad, mtl_backward
from tests._oracle import jacobian, relative_error
from tests._ranks import run_ranks
from tests.distributed._sharded import make_mesh, shard, whole_gradients, whole_modules
from tests.distributed._spy import spying
from tests.distributed._wrapper_spy import spying_on_wrapper, totals

BOUND = 1e-10
S = 8  # bytes of a float64
M = 4  # tasks
EACH = 3  # samples on each rank
IN, HIDDEN, OUT = 6, 7, 5  # the widths of two layers, which are modules of their own
MODULES = 2
SHAPES = [(HIDDEN, IN), (HIDDEN,), (OUT, HIDDEN), (OUT,)]


def _make() -> nn.Sequential:
    torch.manual_seed(4)
    layers = [nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT)]
    return nn.Sequential(*layers).double()


def _data() -> Tensor:
    return torch.randn(12, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def _tasks(outputs: Tensor) -> Tensor:
    return torch.stack([(outputs[:, t] - t).square().mean() for t in range(M)])


def _instances(outputs: Tensor) -> Tensor:
    return outputs.square().sum(dim=1)


def _sharded(replicas: int) -> nn.Module:
    model = _make()
    shard(model, [model[0], model[2]], mesh=make_mesh(replicas), reshard=True)
    return model


def _last_task_beside_the_shards(model: nn.Module, x: Tensor) -> None:
    """The last pass reaches no sharded module, which would not then reshard by itself."""
    attach(model, reshard="speed")
    hidden = model[0](x)
    outputs = model[2](model[1](hidden))
    nowhere = torch.ones((), dtype=x.dtype, requires_grad=True)
    losses = [outputs.square().mean(), outputs.mean(), nowhere.square()]
    mtl_backward(losses, features=outputs, tasks_params=[[], [], []])
    assert whole_modules(model) == 0


def _on_ranks(rank: int, world_size: int, replicas: int) -> dict[str, Any]:
    x = _data()[: EACH * world_size].split(EACH)[rank]

    def plain(model: nn.Module, losses: Tensor) -> None:
        losses.mean().backward()

    def engine(**options: Any) -> Callable[[nn.Module, Tensor], None]:
        def step(model: nn.Module, losses: Tensor) -> None:
            engines[model].backward(losses, UPGradWeighting())

        engines: dict[nn.Module, Engine] = {}

        def prepare(model: nn.Module) -> None:
            engines[model] = Engine(model, **options)

        step.prepare = prepare  # type: ignore[attr-defined]
        return step

    def by_rows(
        reshard: Any, make: Callable[[], Aggregator] = UPGrad
    ) -> Callable[[nn.Module, Tensor], None]:
        def step(model: nn.Module, losses: Tensor) -> None:
            mtl_backward(list(losses), features=losses, shared_params=model.parameters())
            torch.manual_seed(6)
            jac_to_grad(list(model.parameters()), make())

        step.prepare = lambda model: attach(model, reshard=reshard)  # type: ignore[attr-defined]
        return step

    cases: dict[str, tuple[Callable[[nn.Module, Tensor], None], Callable[[Tensor], Tensor]]] = {
        "plain": (plain, _tasks),
        "tasks, memory": (engine(batch_dim=None), _tasks),
        "tasks, speed": (engine(batch_dim=None, reshard="speed"), _tasks),
        "rows, memory": (by_rows("memory"), _tasks),
        "rows, speed": (by_rows("speed"), _tasks),
        "rows, by columns": (by_rows("memory", GradDrop), _tasks),
        "instances": (engine(batch_dim=0, prefer="bytes"), _instances),
    }
    _last_task_beside_the_shards(_sharded(replicas), x)
    found: dict[str, Any] = {}
    for name, (step, losses_of) in cases.items():
        model = _sharded(replicas)
        getattr(step, "prepare", lambda _: None)(model)
        for _ in range(2):  # the second step is like all that follow
            model.zero_grad()
            losses = losses_of(model(x))
            with spying_on_wrapper() as wrapper, spying(rank, world_size) as own:
                step(model, losses)
            assert whole_modules(model) == 0, name
        messages: dict[str, list[list[float]]] = {}
        for operation, sent in own:
            messages.setdefault(operation, []).append([sent])
        found[name] = {
            "wrapper": totals(wrapper),
            "own": {o: [s for (s,) in sent] for o, sent in messages.items()},
            "gradient": whole_gradients(model),
        }
    return found


@cache
def _found(world_size: int, replicas: int = 1) -> list[dict[str, Any]]:
    return run_ranks(_on_ranks, world_size, replicas)


@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_sent(world_size: int) -> None:
    w = world_size
    n = sum(-(-shape[0] // w) * w * (shape[1] if len(shape) > 1 else 1) for shape in SHAPES)
    once = [MODULES, (w - 1) / w * n * S]  # one all-gather, or one reduce-scatter, of all modules

    def times(k: int) -> list[float]:
        return [k * once[0], pytest.approx(k * once[1])]

    wrapper = {
        "plain": (1, 1),
        # One row is reduced for each task, and no gradient is reduced after them.
        "tasks, memory": (M, M),
        "tasks, speed": (1, M),
        "rows, memory": (M, M),
        "rows, speed": (1, M),
        "rows, by columns": (M, M),
        # All are gathered for the first pass, and for the weighted one.
        "instances": (2, 1),
    }
    gramian = 2 * (w - 1) / w * (M * (M + 1) // 2 + w * M) * S  # half of it and flags
    of_rows = 2 * (w - 1) / w * (M * M + w * M) * S
    for rank, found in enumerate(_found(w)):
        assert found.keys() == wrapper.keys()
        for name, (gathers, scatters) in wrapper.items():
            expected = {"all_gather": times(gathers), "reduce_scatter": times(scatters)}
            assert found[name]["wrapper"] == expected, name
        assert found["plain"]["own"] == {}
        for name in ("tasks, memory", "tasks, speed", "rows, memory", "rows, speed"):
            own = found[name]["own"]
            # The handshakes of calls that were seen before: 5 numbers of 8 bytes from each rank.
            headers = own.pop("all_gather")
            assert len(headers) == (1 if name.startswith("tasks") else 3)
            assert max(headers) <= (w - 1) * 64
            weights = (2 + M) * 8.0 if rank == 0 else 0.0
            sums = gramian if name.startswith("tasks") else of_rows
            assert own == {"all_reduce": [pytest.approx(sums)], "broadcast": [weights]}, name
        # Columns stay where they are: what is sent are flags of rows that are finite.
        own = found["rows, by columns"]["own"]
        flags = 2 * (w - 1) / w * w * M * S
        assert own.keys() == {"all_gather", "all_reduce"}
        assert own["all_reduce"] == [pytest.approx(flags)]
        # Samples: what the factors of both layers take, the first from the lower half of the ranks
        # to the upper, or the other way round: half of the pairs of ranks.
        own = found["instances"]["own"]
        samples = EACH * w
        sums = 2 * (w - 1) / w * (samples * (samples + 1) // 2 + samples) * S
        assert own["all_reduce"] == [pytest.approx(sums)]
        total = sum(own["all_to_all_single"])
        others = w - 1
        copies = [others // 2, others - others // 2]
        sizes = [IN + HIDDEN, HIDDEN + OUT]
        possible = {float(EACH * (a * sizes[0] + b * sizes[1]) * S) for a in copies for b in copies}
        assert total in possible


def test_bytes_sent_with_replicas() -> None:
    """Hybrid sharding on 2 x 2 ranks: shards are cut over 2, and summed over 2 replicas."""
    w, replicas, shards = 4, 2, 2
    n = sum(-(-sh[0] // shards) * shards * (sh[1] if len(sh) > 1 else 1) for sh in SHAPES)

    def times(k: int, of_one: float) -> list[float]:
        return [k * MODULES, pytest.approx(k * of_one)]

    over_shards = (shards - 1) / shards * n * S
    over_replicas = 2 * (replicas - 1) / replicas * (n / shards) * S
    wrapper = {
        "plain": (1, 1),
        "tasks, memory": (M, M),
        "tasks, speed": (1, M),
        "rows, memory": (M, M),
        "rows, speed": (1, M),
        "rows, by columns": (M, M),
        "instances": (2, 1),
    }
    # The engine adds up over all ranks, rows over those that hold other columns.
    gramian = 2 * (w - 1) / w * (M * (M + 1) // 2 + w * M) * S
    of_rows = 2 * (shards - 1) / shards * (M * M + shards * M) * S
    for rank, found in enumerate(_found(w, replicas)):
        for name, (gathers, reductions) in wrapper.items():
            assert found[name]["wrapper"] == {
                "all_gather": times(gathers, over_shards),
                "reduce_scatter": times(reductions, over_shards),
                "all_reduce": times(reductions, over_replicas),
            }, name
        assert found["plain"]["own"] == {}
        for name in ("tasks, memory", "tasks, speed", "rows, memory", "rows, speed"):
            own = found[name]["own"]
            headers = own.pop("all_gather")
            assert len(headers) == (1 if name.startswith("tasks") else 3)
            assert max(headers) <= (w - 1) * 64
            weights = (2 + M) * 8.0 if rank == 0 else 0.0
            sums = gramian if name.startswith("tasks") else of_rows
            assert own == {"all_reduce": [pytest.approx(sums)], "broadcast": [weights]}, name
        own = found["rows, by columns"]["own"]
        flags = 2 * (shards - 1) / shards * shards * M * S
        assert own.keys() == {"all_gather", "all_reduce"}
        assert own["all_reduce"] == [pytest.approx(flags)]
        own = found["instances"]["own"]
        samples = EACH * w
        sums = 2 * (w - 1) / w * (samples * (samples + 1) // 2 + samples) * S
        assert own["all_reduce"] == [pytest.approx(sums)]
        # The factors of both layers, from half of the pairs of all ranks to the other half.
        total = sum(own["all_to_all_single"])
        sizes = [IN + HIDDEN, HIDDEN + OUT]
        assert total in {
            float(EACH * (a * sizes[0] + b * sizes[1]) * S) for a in (1, 2) for b in (1, 2)
        }


def test_all_ways_give_the_step_of_one_process() -> None:
    model = _make()
    ranks = [(2, found) for found in _found(2)] + [(4, found) for found in _found(4, 2)]
    for world_size, found in ranks:
        x = _data()[: world_size * EACH]
        for name, case in found.items():
            losses = _instances(model(x)) if name == "instances" else _tasks(model(x))
            rows = jacobian(losses, list(model.parameters()))
            torch.manual_seed(6)
            by_columns = name == "rows, by columns"
            expected = (GradDrop() if by_columns else UPGrad())(rows)
            expected = rows.mean(0) if name == "plain" else expected
            assert relative_error(case["gradient"], expected) <= BOUND, name
