"""World-size invariance of the engine: any split of a batch takes the step of one process.

The bound 1e-10 is the project's: rounding in float64 stays near 1e-15 a step, and five steps of an
optimizer multiply it by far less than the rest.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Partial

from jddist.autogram import Engine
from tests._oracle import relative_error
from tests._ranks import run_ranks, split_sizes
from tests.distributed._training import (
    LOSSES,
    OPTIMIZERS,
    SAMPLES,
    STEPS,
    local_part,
    make_data,
    make_network,
    parameters_of,
    reference,
    upgrad_for,
    wrap,
)

BOUND = 1e-10

WORLDS = [
    (1, "even"),
    (2, "even"),
    (2, "uneven"),
    (2, "empty"),
    (3, "uneven"),
    (3, "empty"),
    (4, "even"),
    (4, "uneven"),
    (4, "empty"),
]


def _train(
    rank: int, world_size: int, kind: str, objective: str, optimizer: str
) -> dict[str, list[Tensor]]:
    model = make_network()
    ddp = wrap(model)
    x, y = (local_part(t, rank, world_size, kind) for t in make_data())
    sums = objective == "task sum"
    engine = {
        "instance": lambda: Engine(ddp, batch_dim=0),
        "instance x task": lambda: Engine(ddp, batch_dim=0),
        "task x instance": lambda: Engine(ddp, batch_dim=1),
        "task": lambda: Engine(ddp, batch_dim=None),
        "task sum": lambda: Engine(ddp, batch_dim=None, objectives=Partial("sum")),
    }[objective]()
    count = len(x) if objective == "task" else None
    opt = OPTIMIZERS[optimizer](list(model.parameters()))
    result: dict[str, list[Tensor]] = {"weights": [], "parameters": [], "gramians": []}
    for step in range(STEPS):
        losses = LOSSES[objective](ddp(x), y)
        opt.zero_grad()
        if step % 2 and not sums:
            weights = engine.backward(losses, upgrad_for(losses), count=count)
        else:
            gramian = engine.compute_gramian(losses, count=count)
            half = gramian.ndim // 2
            flat = gramian.permute(*range(half), *reversed(range(half, 2 * half)))
            m = gramian.shape[:half].numel()
            result["gramians"].append(flat.reshape(m, m))
            weights = engine.compute_weights(gramian, upgrad_for(losses))
            losses.backward(engine.local_weights(weights))
        opt.step()
        result["weights"].append(weights)
        result["parameters"].append(parameters_of(model))
    return result


def _all_objectives(rank: int, world_size: int, kind: str) -> dict[str, dict[str, list[Tensor]]]:
    """Every kind of objectives with every optimizer, in one set of processes: starting is slow."""
    return {
        f"{objective}/{optimizer}": _train(rank, world_size, kind, objective, optimizer)
        for objective in LOSSES
        for optimizer in OPTIMIZERS
    }


@pytest.mark.parametrize(("world_size", "kind"), WORLDS)
def test_any_split_takes_the_step_of_one_process(world_size: int, kind: str) -> None:
    assert kind != "empty" or 0 in split_sizes(SAMPLES, world_size, kind)
    ranks = run_ranks(_all_objectives, world_size, kind)
    for objective in LOSSES:
        for optimizer in OPTIMIZERS:
            expected = reference(objective, optimizer)
            name = f"{objective}/{optimizer}"
            for rank in ranks:
                found = rank[name]
                assert relative_error(found["gramians"][0], expected["gramians"][0]) <= BOUND
                for step in range(STEPS):
                    weights, wanted = found["weights"][step], expected["weights"][step]
                    assert weights.shape == wanted.shape, name
                    assert relative_error(weights, wanted) <= BOUND, (name, step)
                    got = found["parameters"][step]
                    assert relative_error(got, expected["parameters"][step]) <= BOUND, (name, step)
                    # Bit-identical, not merely close.
                    assert torch.equal(weights, ranks[0][name]["weights"][step]), name
                    assert torch.equal(got, ranks[0][name]["parameters"][step]), name
