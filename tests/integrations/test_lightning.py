"""Lightning: manual optimization takes the step of one process, whatever the strategy."""

from __future__ import annotations

from typing import Any

import pytest

from tests._oracle import relative_error
from tests.integrations._host import WORLDS, results_of
from tests.integrations._reference import check, moved, reference, task_reference

pytest.importorskip("lightning")

EXACT = [
    "ddp",
    "ddp, empty",
    "ddp, matrix",
    "ddp, accumulated",
    "ddp, no_sync",
    "ddp, task",
    "ddp, clipped",
    "ddp unused",
    "ddp static",
    "ddp static, accumulated",
    "ddp static, task",
    "ddp static, clipped",
    "ddp views",
    "fully_shard",
    "fully_shard, empty",
    "fully_shard, accumulated",
    "fully_shard, task",
    "fully_shard, clipped",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    return results_of("_lightning_cases", tmp_path_factory.mktemp("lightning"))


def _expected(name: str) -> list[Any]:
    from tests.integrations._lightning_cases import CASES

    case = {key: value for key, value in CASES[name].items() if key not in ("kind", "no_sync")}
    return reference(**case, mean=False)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", EXACT)
def test_any_split_takes_the_step_of_one_process(
    name: str, world_size: int, results: dict[int, list[Any]]
) -> None:
    """Gradients of several backwards add up, as in any manual optimization."""
    check([rank[name] for rank in results[world_size]], _expected(name))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", ["ddp, bf16", "ddp static, bf16", "fully_shard, bf16"])
def test_mixed_precision(name: str, world_size: int, results: dict[int, list[Any]]) -> None:
    """As close as bf16 of another batch size; the parameters move ten times that."""
    expected = _expected(name)
    check([rank[name] for rank in results[world_size]], expected, bound=5e-3)
    assert moved(expected) >= 0.05


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("strategy", ["ddp", "ddp static"])
def test_manual_backward_with_the_engines_weights_is_the_same(
    strategy: str, world_size: int, results: dict[int, list[Any]]
) -> None:
    check([rank[f"{strategy}, by hand"] for rank in results[world_size]], _expected("ddp unused"))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("strategy", ["ddp", "ddp static"])
def test_a_backward_that_ddp_would_not_synchronise_is_refused(
    strategy: str, world_size: int, results: dict[int, list[Any]]
) -> None:
    for rank in results[world_size]:
        message, unmoved = rank[f"{strategy}, Directly"]
        assert "manual_backward" in message and unmoved
        message, unmoved = rank[f"{strategy}, ByEngine"]
        assert "manual_backward" in message and unmoved


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("strategy", ["ddp", "ddp static"])
def test_nan_is_never_silent(strategy: str, world_size: int, results: dict[int, list[Any]]) -> None:
    for rank in results[world_size]:
        message, unmoved = rank[f"{strategy}, Nan"]
        assert "rank 1" in message and unmoved


@pytest.mark.parametrize("world_size", WORLDS)
def test_what_does_not_fit_is_refused(world_size: int, results: dict[int, list[Any]]) -> None:
    for rank in results[world_size]:
        assert "automatic_optimization" in rank["automatic"]
        assert "0 JacobianDescent callbacks" in rank["no callback"]


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_grad_scaler_sees_overflow_on_every_rank(
    world_size: int, results: dict[int, list[Any]]
) -> None:
    check([rank["scaler"] for rank in results[world_size]], _expected("ddp unused"))
    for found in (rank["overflow"] for rank in results[world_size]):
        assert found["weights"] and found["skipped"] and found["scale"] == 2.0**9


@pytest.mark.parametrize("world_size", WORLDS)
def test_groups_of_explicit_jacobians(world_size: int, results: dict[int, list[Any]]) -> None:
    """``mtl_backward`` and ``jac_to_grad_groups`` reduce by themselves, whatever DDP expects."""
    check([rank["groups"] for rank in results[world_size]], task_reference())


@pytest.mark.parametrize("world_size", WORLDS)
def test_its_checkpoints_resume_a_stateful_weighting(
    world_size: int, results: dict[int, list[Any]]
) -> None:
    """The callback keeps the weighting's state."""
    for found in (rank["resumed"] for rank in results[world_size]):
        assert len(found["whole"]) == 4 and len(found["resumed"]) == 2
        for got, wanted in zip(found["half"] + found["resumed"], found["whole"], strict=True):
            # DDP adds up in another order in its first step.
            assert relative_error(got, wanted) <= 1e-12
        assert relative_error(found["forgetful"][-1], found["whole"][-1]) > 1e-4
