"""Transformers' Trainer: the step of one process, logged, and resumed from a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from jddist.aggregation import UPGradWeighting
from tests._oracle import jacobian, relative_error
from tests.distributed._training import (
    LOSSES,
    OPTIMIZERS,
    TASKS,
    make_network,
    parameters_of,
    set_gradients,
)
from tests.integrations._host import WORLDS, results_of
from tests.integrations._reference import check, moved

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

EXACT = ["instance", "matrix", "task", "accumulated", "task, accumulated", "clipped"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    return results_of("_trainer_cases", tmp_path_factory.mktemp("trainer"))


def _reference(
    objective: str,
    optimizer: str = "sgd",
    micro: int = 1,
    clip: float = 0.0,
    bf16: bool = False,
    rows: int | None = None,
) -> dict[str, list[Any]]:
    """One process: parameters, and the share of conflicts and the weights, after each step."""
    from tests.integrations._trainer_cases import PER_STEP, SAMPLES, STEPS, Rows

    model = make_network().float() if bf16 else make_network()
    data = Rows(rows or SAMPLES, torch.float32 if bf16 else torch.float64)
    parameters = list(model.parameters())
    opt = OPTIMIZERS[optimizer](parameters)
    result: dict[str, list[Any]] = {"parameters": [], "conflicts": [], "weights": []}
    size = PER_STEP // micro
    for step in range(STEPS):
        total: Any = 0
        seen: list[Tensor] = []
        shares = []
        for part in range(micro):
            start = step * PER_STEP + part * size
            x, y = data.x[start : start + size], data.y[start : start + size]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                losses = LOSSES[objective](model(x).to(x.dtype), y)
            jac = jacobian(losses, parameters)
            gramian = jac.double() @ jac.double().T
            weights = UPGradWeighting()(gramian)
            total = total + (weights @ jac.double()).to(x.dtype) / micro
            pairs = [gramian[i, j] < 0 for i in range(len(gramian)) for j in range(i)]
            shares.append(sum(map(float, pairs)) / len(pairs))
            seen.append(weights)
        set_gradients(model, total)
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        opt.step()
        result["parameters"].append(parameters_of(model))
        result["conflicts"].append(sum(shares) / micro)
        result["weights"].append(seen)
    return result


def _case(name: str) -> dict[str, Any]:
    from tests.integrations._trainer_cases import CASES

    return CASES[name]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", EXACT)
def test_any_number_of_ranks_takes_the_step_of_one_process(
    name: str, world_size: int, results: dict[int, list[Any]]
) -> None:
    """Also of an uneven last batch; micro-batches are averaged, as the Trainer has it."""
    expected = _reference(**_case(name))["parameters"]
    check([rank[name]["parameters"] for rank in results[world_size]], expected)


@pytest.mark.parametrize("world_size", WORLDS)
def test_mixed_precision(world_size: int, results: dict[int, list[Any]]) -> None:
    """As close as bf16 of another batch size; the parameters move ten times that."""
    expected = _reference(**_case("bf16"))["parameters"]
    check([rank["bf16"]["parameters"] for rank in results[world_size]], expected, bound=5e-3)
    assert moved(expected) >= 0.05


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", ["instance", "task, accumulated"])
def test_weights_and_conflicts_are_logged(
    name: str, world_size: int, results: dict[int, list[Any]]
) -> None:
    expected = _reference(**_case(name))
    log = [entry for entry in results[world_size][0][name]["log"] if "loss" in entry]
    assert len(log) == len(expected["weights"])
    for entry, share, weights in zip(log, expected["conflicts"], expected["weights"], strict=True):
        assert entry["jd_conflicts"] == pytest.approx(share)
        micro = len(weights)
        assert entry["jd_weight_min"] == pytest.approx(sum(float(w.min()) for w in weights) / micro)
        assert entry["jd_weight_max"] == pytest.approx(sum(float(w.max()) for w in weights) / micro)
        single = [entry[f"jd_weight_{i}"] for i in range(TASKS) if f"jd_weight_{i}" in entry]
        means = (sum(weights) / micro).tolist() if name.startswith("task") else []
        assert single == pytest.approx(means)


@pytest.mark.parametrize("world_size", [2])
def test_resuming_restores_a_stateful_weighting(
    world_size: int, results: dict[int, list[Any]]
) -> None:
    for found in (rank["resumed"] for rank in results[world_size]):
        whole, resumed, forgetful = found["whole"], found["resumed"], found["forgetful"]
        assert len(whole) == 4 and len(resumed) == len(forgetful) == 2
        for got, wanted in zip(resumed, whole[2:], strict=True):
            assert torch.equal(got, wanted)
        assert relative_error(forgetful[-1], whole[-1]) > 1e-4  # the state does matter
        assert found["newest"] == 4
        assert "jddist_weighting.pt" in found["missing"]


@pytest.mark.parametrize("world_size", [2])
def test_the_default_losses_are_each_samples_cross_entropy(
    world_size: int, results: dict[int, list[Any]]
) -> None:
    from tests.integrations._trainer_cases import PER_STEP, Classes

    model, data = make_network(), Classes(PER_STEP)
    losses = cross_entropy(model(data.x), data.labels, reduction="none")
    jac = jacobian(losses, model.parameters())
    set_gradients(model, UPGradWeighting()(jac @ jac.T) @ jac)
    OPTIMIZERS["sgd"](list(model.parameters())).step()
    check([rank["classes"] for rank in results[world_size]], [parameters_of(model)])


@pytest.mark.parametrize("world_size", [2])
def test_what_cannot_be_is_refused_on_every_rank(
    world_size: int, results: dict[int, list[Any]]
) -> None:
    for found in (rank["refused"] for rank in results[world_size]):
        assert "rank 1" in found["nan"]
        assert "compute_losses" in found["no losses"]
