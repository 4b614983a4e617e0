"""The state of methods over ranks: sharded, replicated, resharded by a checkpoint."""

from __future__ import annotations

import io
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from jddist import attach
from jddist.aggregation import Aggregator
from jddist.autojac import allocate_state, jac_to_grad
from jddist.distribution.collectives import column_bounds
from tests._ranks import run_ranks
from tests.distributed._methods import METHODS, M, state_losses
from tests.distributed._training import local_part, wrap
from tests.distributed.test_shards import UNEVEN, Rows, jacobian_of, losses_of, set_jacs

STATEFUL = [name for name, m in METHODS.items() if m.make().state_dict()]
BEFORE, AFTER = range(2), range(2, 4)
LIMIT = 1e-10  # As in test_shards: another order of sums.


class _Run:
    """Training steps of all stateful methods, on the same parameters."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.model = Rows(UNEVEN)
        attach(wrap(self.model), objectives=Shard(0))
        self.parameters = list(self.model.parameters())
        self.aggregators = {name: METHODS[name].make() for name in STATEFUL}

    def steps(self, calls: range) -> dict[str, Tensor]:
        return {name: self.steps_of(a, calls) for name, a in self.aggregators.items()}

    def steps_of(self, aggregator: Aggregator, calls: range) -> Tensor:
        found = []
        for call in calls:
            torch.manual_seed(call)
            state_losses(aggregator, losses_of(call))
            rows = local_part(jacobian_of(UNEVEN, call), self.rank, self.world_size, "even")
            set_jacs(self.parameters, rows)
            self.model.zero_grad()
            jac_to_grad(self.parameters, aggregator)
            grads = [p.grad.reshape(-1) for p in self.parameters if p.grad is not None]
            found.append(torch.cat(grads))
        return torch.stack(found)

    def state(self) -> dict[str, Any]:
        return {name: a.state_dict() for name, a in self.aggregators.items()}

    def save(self, directory: str) -> None:
        dcp.save(self.state(), checkpoint_id=directory)

    def load(self, directory: str) -> None:
        for aggregator in self.aggregators.values():
            allocate_state(self.parameters, aggregator, M)
        state = self.state()
        dcp.load(state, checkpoint_id=directory)
        for name, aggregator in self.aggregators.items():
            aggregator.load_state_dict(state[name])


def _saving(rank: int, world_size: int, directory: str) -> dict[str, Any]:
    run = _Run(rank, world_size)
    run.steps(BEFORE)
    run.save(directory)
    state = run.state()
    if world_size == 1:
        torch.save(state, directory + ".pt")
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    copies = deepcopy(run.aggregators)
    found: dict[str, Any] = {"went on": run.steps(AFTER)}
    run.aggregators = copies
    found["copied"] = run.steps(AFTER)
    run.aggregators = {name: METHODS[name].make() for name in STATEFUL}
    for name, aggregator in run.aggregators.items():
        aggregator.load_state_dict(loaded[name])
    found["read"] = run.steps(AFTER)
    found["shapes"], found["replicated"] = {}, {}
    for method, of_method in state.items():
        for key, value in of_method.items():
            for part, tensor in value.items() if isinstance(value, dict) else [("", value)]:
                name = f"{method}.{key}.{part}"
                if isinstance(tensor, DTensor):
                    assert tensor.placements == (Shard(1),)
                    found["shapes"][name] = [list(tensor.shape), list(tensor.to_local().shape)]
                else:
                    found["replicated"][name] = tensor
    return found


def _loading(rank: int, world_size: int, directory: str) -> dict[str, Tensor]:
    run = _Run(rank, world_size)
    run.load(directory)
    return run.steps(AFTER)


def _loading_whole(rank: int, world_size: int, file: str) -> dict[str, Tensor]:
    """From a file of one process, without a checkpoint library: each rank takes its columns."""
    run = _Run(rank, world_size)
    for name, state in torch.load(file, weights_only=True).items():
        run.aggregators[name].load_state_dict(state)
    return run.steps(AFTER)


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(STATEFUL)
    for name, vectors in found.items():
        error = (vectors - expected[name]).norm() / expected[name].norm()
        assert float(error) <= LIMIT, name


def test_checkpoints_serve_any_number_of_ranks(tmp_path: Path) -> None:
    alone, three = str(tmp_path / "1"), str(tmp_path / "3")
    (one,) = run_ranks(_saving, 1, alone)
    expected = one["went on"]
    assert one["shapes"] == {}
    ranks = run_ranks(_saving, 3, three)
    for rank, found in enumerate(ranks):
        for way in ("went on", "copied", "read"):
            _assert_same(found[way], expected)
        # Each rank holds the columns of its own shard, and no more.
        start, stop = column_bounds(UNEVEN, 3)[rank]
        assert len(found["shapes"]) == 5  # ExcessMTL three times, MoCo and DB-MTL
        assert all(v == [[M, UNEVEN], [M, stop - start]] for v in found["shapes"].values())
        # All the rest is the same everywhere, bit by bit.
        assert found["replicated"].keys() == ranks[0]["replicated"].keys()
        for name, tensor in found["replicated"].items():
            assert torch.equal(tensor, ranks[0]["replicated"][name]), name
    for world_size, directory in ((3, alone), (1, three), (2, three)):
        for found in run_ranks(_loading, world_size, directory):
            _assert_same(found, expected)
    for found in run_ranks(_loading_whole, 2, alone + ".pt"):
        _assert_same(found, expected)
