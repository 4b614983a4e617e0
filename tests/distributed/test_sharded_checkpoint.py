"""Training goes on from a checkpoint on another number of ranks as if nothing had happened.

Model, optimizer and the methods' state go through torch.distributed.checkpoint alone. The bound is
the project's: 1e-10, as for any cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from jddist import attach
from jddist.aggregation import Aggregator, GradVacWeighting, MoCo
from jddist.autogram import Engine
from jddist.autojac import allocate_state, jac_to_grad, mtl_backward
from tests._oracle import relative_error
from tests._ranks import run_ranks
from tests.distributed._sharded import make_mesh, make_tied, shard, whole_parameters
from tests.distributed._training import LOSSES, TASKS, local_part, make_data

BOUND = 1e-10
BEFORE, AFTER = 2, 3
NAMES = ("engine", "rows")


class _Run:
    """Two trainings: tasks by an engine and a stateful weighting, and by rows and MoCo, whose state
    has a number for each task and parameter."""

    def __init__(self, rank: int, world_size: int, kind: str, replicas: int = 1) -> None:
        self.part = (rank, world_size, kind)
        self.models: dict[str, nn.Module] = {name: make_tied() for name in NAMES}
        if world_size > 1:
            mesh = make_mesh(replicas)
            for model in self.models.values():
                children = [m for n, m in model.named_children() if n not in ("last", "again")]
                shard(model, children, mesh=mesh, reshard=True)
        self.optimizers = {
            name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
            for name, model in self.models.items()
        }
        attach(self.models["rows"])
        self.engine = Engine(self.models["engine"], batch_dim=None)
        self.methods: dict[str, nn.Module] = {"engine": GradVacWeighting(), "rows": MoCo()}

    @property
    def trained(self) -> list[Tensor]:
        return [p for p in self.models["rows"].parameters() if p.requires_grad]

    def step(self, number: int) -> None:
        torch.manual_seed(number)  # for the order in which GradVac takes the tasks
        x, y = (local_part(t, *self.part) for t in make_data())
        losses = LOSSES["task"](self.models["engine"](x), y)
        self.engine.backward(losses, self.methods["engine"], count=len(x))
        features = self.models["rows"](x)
        tasks = list(LOSSES["task"](features, y))
        mtl_backward(tasks, features=features, tasks_params=[[]] * TASKS, count=len(x))
        assert isinstance(aggregator := self.methods["rows"], Aggregator)
        jac_to_grad(self.trained, aggregator)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()

    def steps(self, numbers: range) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {name: [] for name in NAMES}
        for number in numbers:
            self.step(number)
            for name, model in self.models.items():
                found[name].append(whole_parameters(model))
        return found

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in NAMES:
            model, optimizer = get_state_dict(self.models[name], self.optimizers[name])
            method = self.methods[name].state_dict()
            found[name] = {"model": model, "optimizer": optimizer, "method": method}
        return found

    def load(self, directory: str) -> None:
        aggregator = self.methods["rows"]
        assert isinstance(aggregator, Aggregator)
        allocate_state(self.trained, aggregator, TASKS)
        self.methods["engine"](torch.eye(TASKS, dtype=torch.float64))  # makes room for its state
        state = self.state()
        dcp.load(state, checkpoint_id=directory)
        for name in NAMES:
            set_state_dict(
                self.models[name],
                self.optimizers[name],
                model_state_dict=state[name]["model"],
                optim_state_dict=state[name]["optimizer"],
            )
            self.methods[name].load_state_dict(state[name]["method"])


def _saving(
    rank: int, world_size: int, kind: str, replicas: int, directory: str
) -> dict[str, list[Tensor]]:
    run = _Run(rank, world_size, kind, replicas)
    run.steps(range(BEFORE))
    state = run.state()
    dcp.save(state, checkpoint_id=directory)
    sharded = [t for t in state["rows"]["method"].values() if isinstance(t, DTensor)]
    columns = sum(p.numel() for p in run.trained)
    # MoCo's state is no larger on a rank than its part of the parameters' rows.
    each = -(-columns // (world_size // replicas))
    assert world_size == 1 or [t.to_local().shape[1] <= each for t in sharded] == [True]
    return run.steps(range(BEFORE, BEFORE + AFTER))


def _loading(
    rank: int, world_size: int, kind: str, replicas: int, directory: str
) -> dict[str, list[Tensor]]:
    run = _Run(rank, world_size, kind, replicas)
    run.load(directory)
    return run.steps(range(BEFORE, BEFORE + AFTER))


def test_training_goes_on_on_another_number_of_ranks(tmp_path: Path) -> None:
    alone, two, square = (str(tmp_path / name) for name in ("alone", "two", "square"))
    (expected,) = run_ranks(_saving, 1, "even", 1, alone)
    found = [
        run_ranks(_saving, 2, "uneven", 1, two),
        run_ranks(_saving, 4, "empty", 2, square),
        run_ranks(_loading, 3, "uneven", 1, two),
        run_ranks(_loading, 4, "uneven", 2, two),
        run_ranks(_loading, 1, "even", 1, two),
        run_ranks(_loading, 2, "empty", 1, alone),
        run_ranks(_loading, 2, "even", 1, square),
    ]
    for ranks in found:
        for rank in ranks:
            for name in NAMES:
                for got, want in zip(rank[name], expected[name], strict=True):
                    assert relative_error(got, want) <= BOUND, (name, len(ranks))
