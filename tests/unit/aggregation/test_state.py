"""What methods remember and draw: GradVac's targets, and the random generator."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from jddist._stateful import Stateful
from jddist.aggregation import (
    Aggregator,
    GradVac,
    GradVacWeighting,
    PCGrad,
    Random,
    UPGrad,
)
from tests.unit.aggregation._matrices import make_matrix


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _run(aggregator: Aggregator, seeds: range, m: int = 4, dtype: Any = torch.float64) -> Tensor:
    results = []
    for seed in seeds:
        torch.manual_seed(seed)
        results.append(aggregator(make_matrix("conflicting", m, seed).to(dtype)))
    return torch.stack(results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("m", [1, 2, 5])
def test_gradvac_resumes_from_its_state_dict(m: int, dtype: torch.dtype) -> None:
    uninterrupted = GradVac()
    expected = _run(uninterrupted, range(6), m, dtype)[3:]
    first, second = GradVac(), GradVac()
    _run(first, range(3), m, dtype)
    second.load_state_dict(_through_a_file(first.state_dict()))
    assert torch.equal(_run(second, range(3, 6), m, dtype), expected)


def test_gradvac_state_counts() -> None:
    fresh = _run(GradVac(), range(3, 6))
    used = GradVac()
    _run(used, range(3))
    assert not torch.equal(_run(used, range(3, 6)), fresh)


def test_a_fresh_state_clears_a_used_one() -> None:
    used = GradVac()
    _run(used, range(3))
    used.load_state_dict(_through_a_file(GradVac().state_dict()))
    assert torch.equal(_run(used, range(3, 6)), _run(GradVac(), range(3, 6)))


def test_state_is_a_copy_in_both_directions() -> None:
    first, second = GradVacWeighting(), GradVacWeighting()
    gramian = torch.tensor([[1.0, -0.5], [-0.5, 2.0]])
    first(gramian)
    state = first.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    second.load_state_dict(state)
    first(gramian)
    second(gramian)
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_state_holds_plain_tensors_only() -> None:
    aggregator = GradVac()
    _run(aggregator, range(2), m=3)
    state = aggregator.state_dict()
    assert "gramian_weighting._extra_state" in state
    assert all(type(value) is Tensor and value.shape == (3, 3) for value in state.values())


@pytest.mark.parametrize("make", [GradVac, GradVacWeighting])
def test_reset_forgets(make: type[GradVac | GradVacWeighting]) -> None:
    square = make_matrix("conflicting", 3, seed=0, n=3)
    statistic = square @ square.T
    stateful = make()
    assert isinstance(stateful, Stateful)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(stateful(statistic))
        stateful(statistic)
        stateful.reset()
    assert torch.equal(results[0], results[1])


def test_another_number_of_objectives_or_precision_starts_afresh() -> None:
    used = GradVac()
    _run(used, range(3), m=4)
    assert torch.equal(_run(used, range(2), m=3), _run(GradVac(), range(2), m=3))
    expected = _run(GradVac(), range(2), m=3, dtype=torch.float32)
    assert torch.equal(_run(used, range(2), m=3, dtype=torch.float32), expected)


def test_targets_follow_the_moving_average() -> None:
    weighting = GradVacWeighting(beta=0.25, eps=0.0)
    gramian = torch.tensor([[4.0, 1.0], [1.0, 1.0]], dtype=torch.float64)  # The cosine is 0.5.
    weighting(gramian)
    weighting(gramian)
    target = 0.25 * 0.5 + 0.75 * (0.25 * 0.5)
    expected = torch.tensor([[0.0, target], [target, 0.0]], dtype=torch.float64)
    assert_close(weighting.get_extra_state(), expected)


def test_gradvac_lifts_the_cosine_to_its_target() -> None:
    weighting = GradVacWeighting(beta=0.0, eps=0.0)
    weighting.set_extra_state(torch.tensor([[0.0, 0.3], [-1.0, 0.0]], dtype=torch.float64))
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    weights = weighting(rows @ rows.T)
    # Only row 0 is turned, by a multiple of row 1.
    turned = rows[0] + (weights[1] - 1.0) * rows[1]
    assert weights[0] == 1.0
    assert_close(turned @ rows[1] / (turned.norm() * rows[1].norm()), turned.new_tensor(0.3))


@pytest.mark.parametrize("make", [Random, PCGrad, GradVac])
def test_equal_seeds_give_equal_draws(make: type[Aggregator]) -> None:
    assert torch.equal(_run(make(), range(3)), _run(make(), range(3)))


@pytest.mark.parametrize("make", [Random, PCGrad, GradVac])
def test_other_seeds_give_other_draws(make: type[Aggregator]) -> None:
    matrix = make_matrix("conflicting", 6, seed=0)
    results = []
    for seed in range(2):
        torch.manual_seed(seed)
        results.append(make()(matrix))
    assert not torch.allclose(results[0], results[1])


@pytest.mark.parametrize(
    ("aggregator", "draw"),
    [
        (Random(), lambda m: torch.randn(m, dtype=torch.float64)),
        (PCGrad(), lambda m: [torch.randperm(m) for _ in range(m)]),
        (GradVac(), lambda m: [torch.randperm(m - 1) for _ in range(m)]),
        (UPGrad(), lambda m: None),
    ],
    ids=["Random", "PCGrad", "GradVac", "UPGrad"],
)
def test_documented_draws(aggregator: Aggregator, draw: Any) -> None:
    matrix = make_matrix("conflicting", 5, seed=0)
    torch.manual_seed(0)
    aggregator(matrix)
    position = torch.random.get_rng_state()
    torch.manual_seed(0)
    draw(5)
    assert torch.equal(torch.random.get_rng_state(), position)
