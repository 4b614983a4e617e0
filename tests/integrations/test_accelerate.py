"""Accelerate: ``accelerator.backward`` takes the step of one process on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests._oracle import gramian, relative_error
from tests.distributed._training import make_data
from tests.integrations._host import WORLDS, results_of
from tests.integrations._reference import check, moved, reference, task_reference

pytest.importorskip("accelerate")

EXACT = [
    "instance",
    "instance, empty",
    "instance, accumulated",
    "instance x task",
    "task",
    "task, accumulated",
    "clipped",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    return results_of("_accelerate_cases", tmp_path_factory.mktemp("accelerate"))


def _case(name: str) -> dict[str, Any]:
    from tests.integrations._accelerate_cases import CASES

    return {key: value for key, value in CASES[name].items() if key != "kind"}


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", EXACT)
def test_any_split_takes_the_step_of_one_process(
    name: str, world_size: int, results: dict[int, list[Any]]
) -> None:
    """Accumulated steps are the means over micro-batches, as Accelerate has it."""
    check([rank[name] for rank in results[world_size]], reference(**_case(name)))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", ["bf16", "bf16, task"])
def test_mixed_precision(name: str, world_size: int, results: dict[int, list[Any]]) -> None:
    """Under autocast, as close as bf16 of another batch size; parameters move ten times that."""
    expected = reference(**_case(name))
    check([rank[name] for rank in results[world_size]], expected, bound=5e-3)
    assert moved(expected) >= 0.05


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_model_of_one_layer(world_size: int, results: dict[int, list[Any]]) -> None:
    for found, weight, bias in (rank["bare root"] for rank in results[world_size]):
        layer = nn.Linear(5, 1)
        layer.load_state_dict({"weight": weight, "bias": bias})
        with torch.autocast("cpu", torch.bfloat16):
            losses = layer(make_data()[0].float()).float().square().squeeze(1)
        assert relative_error(found, gramian(losses, layer.parameters())) <= 5e-3


@pytest.mark.parametrize("world_size", WORLDS)
def test_nan_is_never_silent(world_size: int, results: dict[int, list[Any]]) -> None:
    for found in (rank["nan"] for rank in results[world_size]):
        assert "rank 1" in found["raised"] and found["grads"] == 0
        assert found["skipped"] == 0.0 and found["warned"] and found["grads after skip"] == 0.0
        assert found["goes on"]


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_grad_scaler_sees_overflow_on_every_rank(
    world_size: int, results: dict[int, list[Any]]
) -> None:
    check([rank["scaler"] for rank in results[world_size]], reference("instance"))
    for found in (rank["overflow"] for rank in results[world_size]):
        assert found["weights"] and found["skipped"] and found["scale"] == 2.0**9


@pytest.mark.parametrize("world_size", WORLDS)
def test_groups_of_explicit_jacobians(world_size: int, results: dict[int, list[Any]]) -> None:
    """``mtl_backward`` and ``jac_to_grad_groups``, after ``attach`` of the prepared model."""
    check([rank["groups"] for rank in results[world_size]], task_reference())


@pytest.mark.parametrize("world_size", WORLDS)
def test_its_checkpoints_resume_a_stateful_weighting(
    world_size: int, results: dict[int, list[Any]]
) -> None:
    """By ``register_for_checkpointing(weighting)``."""
    for found in (rank["resumed"] for rank in results[world_size]):
        for got, wanted in zip(found["resumed"], found["whole"][2:], strict=True):
            # DDP adds up in another order in its first step.
            assert relative_error(got, wanted) <= 1e-12
        # Without it the state is lost, and it does matter.
        assert relative_error(found["forgetful"][-1], found["whole"][-1]) > 1e-4
