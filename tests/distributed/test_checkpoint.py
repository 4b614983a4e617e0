"""A run that is saved on some ranks goes on, step for step, on any other number of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from jddist import attach
from jddist.aggregation import ExcessMTL, GradVacWeighting, MoCo
from jddist.autogram import Engine
from jddist.autojac import allocate_state, backward, jac_to_grad
from jddist.checkpoint import Checkpointer
from jddist.errors import CheckpointError
from tests._oracle import relative_error
from tests._ranks import run_ranks
from tests.distributed._sharded import make_mesh, make_tied, shard, whole
from tests.distributed._training import LOSSES, flatten, local_part, make_data, wrap

BOUND = 1e-10
Wrapper = Literal["plain", "ddp", "sharded", "hybrid"]
M = 9


class _Run:
    """Two models: one trained through an engine, one through explicit rows."""

    def __init__(self, directory: str, wrapper: Wrapper, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        models = [_wrapped(make_tied(), wrapper), _wrapped(make_tied(), wrapper)]
        self.first, self.second = models
        self.engine = Engine(self.first, batch_dim=0)
        self.weighting = GradVacWeighting()
        attach(self.second, objectives=Shard(0))
        self.trained = [p for p in self.second.parameters() if p.requires_grad]
        self.aggregators = {"moco": MoCo(), "excess": ExcessMTL()}
        self.optimizers = [
            torch.optim.AdamW(self.first.parameters(), lr=0.01),
            torch.optim.SGD(self.trained, lr=0.05, momentum=0.9, dampening=0.1),
        ]
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizers[0], 0.9)
        model = nn.ModuleDict({"first": self.first, "second": self.second})
        others = {"schedule": self.schedule, "weighting": self.weighting, **self.aggregators}
        self.checkpointer = Checkpointer(directory, model, self.optimizers, others=others)
        self.taken = 0

    def allocate(self) -> None:
        for aggregator in self.aggregators.values():
            allocate_state(self.trained, aggregator, M)

    def steps(self, count: int) -> Tensor:
        x, y = (local_part(t, self.rank, self.world_size, "even") for t in make_data())
        for _ in range(count):
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            losses = LOSSES["instance"](self.first(x), y)
            self.engine.backward(losses, self.weighting)
            aggregator = self.aggregators["moco" if self.taken % 2 else "excess"]
            backward(LOSSES["instance"](self.second(x), y))
            jac_to_grad(self.trained, aggregator)
            for optimizer in self.optimizers:
                optimizer.step()
            self.schedule.step()
            self.taken += 1
        models = [*self.first.parameters(), *self.second.parameters()]
        return flatten([whole(p) for p in models])


def _wrapped(model: nn.Module, wrapper: Wrapper) -> nn.Module:
    if wrapper == "plain":
        return model
    if wrapper == "ddp":
        return wrap(model)
    children = [model.get_submodule("first"), model.get_submodule("narrow")]
    return shard(model, children, mesh=make_mesh(2 if wrapper == "hybrid" else 1))


def _saving(rank: int, world_size: int, directory: str, wrappers: list[Wrapper]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for wrapper in wrappers:
        torch.manual_seed(5)
        run = _Run(f"{directory}/{wrapper}", wrapper, rank, world_size)
        run.steps(3)
        run.checkpointer.save(3, {"seen": 27}, wait=wrapper != "ddp")
        found[wrapper] = run.steps(3)
        run.checkpointer.close()
    return found


def _loading(
    rank: int, world_size: int, directories: list[str], wrappers: list[Wrapper]
) -> dict[str, Tensor]:
    found = {}
    for directory in directories:
        for wrapper in wrappers:
            torch.manual_seed(rank)
            run = _Run(directory, wrapper, rank, world_size)
            if rank % 2 == 0 or world_size % 2 == 1:
                run.allocate()
            if world_size == 2:
                run.steps(1)  # into a run that has state of its own already
            loaded = run.checkpointer.load_latest()
            assert loaded is not None and loaded.step == 3 and loaded.position == {"seen": 27}
            run.taken = 3
            found[f"{directory} to {wrapper}"] = run.steps(3)
    return found


def test_any_wrapper_and_number_of_ranks_goes_on_from_any_other(tmp_path: Path) -> None:
    (alone,) = run_ranks(_saving, 1, str(tmp_path / "1"), ["ddp"])
    expected = alone["ddp"]
    wrappers: list[Wrapper] = ["ddp", "sharded"]
    for found in run_ranks(_saving, 3, str(tmp_path / "3"), wrappers, timeout=120):
        for name, parameters in found.items():
            assert relative_error(parameters, expected) <= BOUND, name
    one, replicated, sharded = (str(tmp_path / d) for d in ("1/ddp", "3/ddp", "3/sharded"))
    resumed: list[tuple[int, list[str], list[Wrapper]]] = [
        (1, [replicated, sharded], ["plain"]),
        (2, [one, replicated, sharded], ["ddp", "sharded"]),
        (4, [sharded], ["ddp", "hybrid"]),
    ]
    for world_size, directories, kinds in resumed:
        for found in run_ranks(_loading, world_size, directories, kinds, timeout=240):
            assert len(found) == len(directories) * len(kinds)
            for name, parameters in found.items():
                assert relative_error(parameters, expected) <= BOUND, (world_size, name)


def _failing(rank: int, world_size: int, directory: str) -> dict[str, str]:
    run = _Run(directory, "ddp", rank, world_size)
    checkpointer, messages = run.checkpointer, {}
    torch.manual_seed(rank)
    run.steps(1)
    checkpointer.save(1)
    random = torch.get_rng_state()

    def note(name: str, step: int, position: dict[str, Any], **options: bool) -> None:
        with pytest.raises(CheckpointError) as caught:
            checkpointer.save(step, position, **options)
            checkpointer.wait()
        messages[name] = str(caught.value)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    note("step", 2 + rank, {})
    note("position", 2, {"seen": rank})
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(os, "fsync", full)
        note("full", 2, {})
        note("full in the background", 2, {}, wait=False)
    if rank == 0:  # which tidies up
        assert [p.name for p in Path(directory).iterdir() if p.name.startswith(".")] == []
    run.steps(1)
    checkpointer.save(2)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(os, "fsync", full)
        run.steps(1)
        note("afterwards", 3, {})
    if rank == 0:
        with open(f"{directory}/000002-step-2/__1_0.distcp", "r+b") as file:
            file.truncate(100)
    torch.manual_seed(9)
    fresh = _Run(directory, "ddp", rank, world_size)
    if rank == 0:
        with pytest.warns(UserWarning, match="damaged"):
            loaded = fresh.checkpointer.load_latest()
    else:
        loaded = fresh.checkpointer.load_latest()
    assert loaded is not None and loaded.step == 1
    messages["skipped"] = loaded.skipped["000002-step-2"]
    assert torch.equal(torch.get_rng_state(), random)
    fresh.checkpointer.close()
    run.checkpointer.close()
    return messages


def test_a_failure_on_one_rank_is_the_same_error_on_all(tmp_path: Path) -> None:
    ranks = run_ranks(_failing, 2, str(tmp_path))
    for found in ranks:
        assert found == ranks[0]
        assert "another step (rank 0: 2, rank 1: 3)" in found["step"]
        assert 'another position (rank 0: {"seen": 0}, rank 1: {"seen": 1})' in found["position"]
        for name in ("full", "full in the background", "afterwards"):
            assert "failed on rank 1: OSError: [Errno 28] No space left" in found[name]
            assert "those that were there are untouched" in found[name]
        assert "__1_0.distcp has 100 bytes instead of" in found["skipped"]


def _seeding(rank: int, world_size: int, directory: str, alike: bool) -> list[list[float]]:
    """Random numbers after a resume on these ranks, of a run of two."""
    model = wrap(make_tied())
    checkpointer = Checkpointer(directory, model)
    if world_size == 2:
        torch.manual_seed(3 if alike else rank)
        checkpointer.save(0)
        expected = torch.rand(3)
        torch.manual_seed(77)
        checkpointer.load_latest()
        assert torch.equal(torch.rand(3), expected)
        return [expected.tolist()]
    found = []
    for _ in range(2):  # twice the same
        torch.manual_seed(77)
        checkpointer.load_latest()
        found.append(torch.rand(3).tolist())
    return found


@pytest.mark.parametrize("alike", [True, False])
def test_random_states_of_ranks_that_are_new(tmp_path: Path, alike: bool) -> None:
    before = [found[0] for found in run_ranks(_seeding, 2, str(tmp_path), alike)]
    after = run_ranks(_seeding, 3, str(tmp_path), alike)
    assert all(first == second for first, second in after)
    assert [found[0] for found in after[:2]] == before
    assert (after[2][0] in before) == alike
