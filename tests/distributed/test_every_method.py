"""All that ``jddist.aggregation`` exports is trained with, on every way to place a model.

The conformance of sharded models trains all methods together, and this does for copies of a model
(DistributedDataParallel). Each by itself, by turns through the engine and through rows, is slow.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jddist import aggregation
from tests._ranks import run_ranks
from tests.distributed._conformance import CASES, Found, Setup, check_cases, check_same
from tests.distributed._every_method import KINDS, TWO_BATCHES, reference_of_all, train_all
from tests.distributed._methods import METHODS
from tests.distributed._tensor_parallel import TensorParallelSetup, TwoDimensionalSetup
from tests.distributed._training import upgrad_for, wrap
from tests.distributed.test_fully_shard import FullyShardSetup
from tests.distributed.test_task_invariance import MultiTask

OF_METHODS = [case for case in CASES if case.startswith(("every method", "two batches"))]


class CopiesSetup(Setup):
    """A copy of the model on each rank."""

    def place(self, model: nn.Module, *, reshard: bool | None = None) -> nn.Module:
        return wrap(model)

    def place_tasks(self, model: MultiTask, *, heads: bool) -> nn.Module:
        raise NotImplementedError


def test_everything_public_is_in_the_matrix() -> None:
    """Without exception: what joins the package has to join METHODS or TWO_BATCHES."""
    exported = {getattr(aggregation, name) for name in aggregation.__all__}
    made: list[object] = [method.make() for method in METHODS.values()]
    made += [make() for make in TWO_BATCHES.values()]
    made.append(upgrad_for(torch.zeros(2, 2)))  # what the conformance gives to the engine
    modules = [part for one in made if isinstance(one, nn.Module) for part in one.modules()]
    covered = {cls for part in modules for cls in type(part).__mro__}
    assert exported - covered == set()


def _on_copies(rank: int, world_size: int, kind: str) -> dict[str, Found]:
    setup = CopiesSetup(rank, world_size, kind)
    return {case: CASES[case][0](setup) for case in OF_METHODS}


def test_copies_train_with_every_method_as_one_process() -> None:
    check_cases(run_ranks(_on_copies, 3, "empty"))


def _one_by_one(rank: int, world_size: int, placed: str, split: str) -> dict[str, Found]:
    setup: Setup
    if placed == "copies":
        setup = CopiesSetup(rank, world_size, split)
    elif placed == "tensor parallel":
        setup = TensorParallelSetup(rank, world_size)
    elif placed == "two dimensions":
        setup = TwoDimensionalSetup(rank, world_size, split, 2)
    else:
        replicas = 2 if placed == "replicas" else 1
        setup = FullyShardSetup(rank, world_size, split, replicas)
    return {kind: train_all(setup, kind) for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placed", "world_size", "split"),
    [
        ("copies", 2, "empty"),
        ("shards", 1, "even"),
        ("shards", 2, "uneven"),
        ("shards", 3, "empty"),
        ("shards", 4, "uneven"),
        ("replicas", 4, "empty"),
        ("tensor parallel", 2, "even"),
        ("two dimensions", 4, "uneven"),
    ],
)
def test_each_method_trains_as_in_one_process(placed: str, world_size: int, split: str) -> None:
    ranks = run_ranks(_one_by_one, world_size, placed, split, timeout=300.0)
    for kind in KINDS:
        check_same(kind, [found[kind] for found in ranks], reference_of_all(kind))
