"""World-size invariance on tensor-parallel layers, alone and in ``fully_shard``.

With three and four ranks some layers are cut unevenly, and some ranks hold nothing of them.
"""

from __future__ import annotations

import pytest

from tests._ranks import run_ranks
from tests.distributed._conformance import CASES, Found, check_cases, run_cases
from tests.distributed._tensor_parallel import TensorParallelSetup, TwoDimensionalSetup

# What concerns resharding alone, and what other numbers of ranks show well enough.
RESHARDING = {"instance, keep", "task, keep"}
LEFT_OUT = {*RESHARDING, "task x instance", "sharded heads"}
LEFT_OUT |= {case for case in CASES if case.startswith("every method")}


def _alone(rank: int, world_size: int) -> dict[str, Found]:
    setup = TensorParallelSetup(rank, world_size)
    return run_cases(setup, RESHARDING if world_size == 2 else LEFT_OUT)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_tensor_parallel_layers_take_the_step_of_one_process(world_size: int) -> None:
    check_cases(run_ranks(_alone, world_size, timeout=200.0))


def _in_fully_shard(rank: int, world_size: int, kind: str) -> dict[str, Found]:
    setup = TwoDimensionalSetup(rank, world_size, kind, 2)
    return run_cases(setup, RESHARDING if kind == "uneven" else LEFT_OUT)


@pytest.mark.parametrize("kind", ["uneven", "empty"])
def test_two_dimensions_take_the_step_of_one_process(kind: str) -> None:
    check_cases(run_ranks(_in_fully_shard, 4, kind, timeout=200.0))
