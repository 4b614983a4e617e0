"""What methods remember and draw: GradVac's targets, and the random generator."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from jddist._stateful import Stateful
from jddist.aggregation import (
    PCD,
    Aggregator,
    GradVac,
    GradVacWeighting,
    NashMTL,
    NashMTLWeighting,
    PCDWeighting,
    PCGrad,
    Random,
    UPGrad,
    Weighting,
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


STATEFUL: dict[str, Callable[[int], Aggregator]] = {
    "GradVac": lambda m: GradVac(),
    "NashMTL": lambda m: NashMTL(m, update_weights_every=4),
    "PCD": lambda m: PCD(tau=0.3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("name", STATEFUL)
def test_methods_resume_from_their_state_dict(name: str, m: int, dtype: torch.dtype) -> None:
    make = STATEFUL[name]
    uninterrupted = make(m)
    expected = _run(uninterrupted, range(6), m, dtype)[3:]
    first, second = make(m), make(m)
    _run(first, range(3), m, dtype)
    second.load_state_dict(_through_a_file(first.state_dict()))
    assert torch.equal(_run(second, range(3, 6), m, dtype), expected)


@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
def test_state_counts(make: Callable[[int], Aggregator]) -> None:
    fresh = _run(make(4), range(3, 6))
    used = make(4)
    _run(used, range(3))
    assert not torch.equal(_run(used, range(3, 6)), fresh)


@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
def test_a_fresh_state_clears_a_used_one(make: Callable[[int], Aggregator]) -> None:
    used = make(4)
    _run(used, range(3))
    used.load_state_dict(_through_a_file(make(4).state_dict()))
    assert torch.equal(_run(used, range(3, 6)), _run(make(4), range(3, 6)))


@pytest.mark.parametrize(
    "make",
    [GradVacWeighting, PCDWeighting, lambda: NashMTLWeighting(2)],
    ids=["GradVac", "PCD", "NashMTL"],
)
def test_state_is_a_copy_in_both_directions(make: Callable[[], Weighting]) -> None:
    first, second = make(), make()
    gramian = torch.tensor([[1.0, -0.5], [-0.5, 2.0]])
    first(gramian)
    state = first.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    second.load_state_dict(state)
    first(gramian)
    second(gramian)
    assert all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize("name", STATEFUL)
def test_state_holds_plain_tensors_only(name: str) -> None:
    aggregator = STATEFUL[name](3)
    _run(aggregator, range(2), m=3)
    state = aggregator.state_dict()
    assert "gramian_weighting._extra_state" in state
    shape = (3, 3) if name == "GradVac" else (4,)
    assert all(type(value) is Tensor and value.shape == shape for value in state.values())


@pytest.mark.parametrize(
    "make",
    [
        GradVac,
        GradVacWeighting,
        PCD,
        PCDWeighting,
        lambda: NashMTL(3, update_weights_every=5),
        lambda: NashMTLWeighting(3, update_weights_every=5),
    ],
)
def test_reset_forgets(make: Callable[[], Any]) -> None:
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


def test_nashmtl_keeps_its_weights_for_some_calls_and_clips_at_each() -> None:
    nash = NashMTL(2, max_norm=0.5, update_weights_every=3)
    matrices = [make_matrix("random", 2, seed).double() for seed in range(4)]
    alone = [NashMTL(2, max_norm=0.0).gramian_weighting(m @ m.T) for m in matrices]
    for k, matrix in enumerate(matrices):
        weights = nash.gramian_weighting(matrix @ matrix.T)
        solution = alone[0] if k < 3 else alone[3]
        length = (solution @ matrix).norm()
        assert_close(weights, solution * min(1.0, float(0.5 / length)))


def test_nashmtl_refuses_another_number_of_objectives() -> None:
    nash = NashMTL(3)
    nash(torch.eye(3))
    with pytest.raises(ValueError, match="n_tasks=3 .* 2"):
        nash(torch.eye(2))
    nash.n_tasks = 2
    assert_close(nash(torch.eye(2)), NashMTL(2)(torch.eye(2)))


def test_pcd_averages_the_squared_lengths() -> None:
    pcd = PCDWeighting(beta=0.75, eps=0.0)
    for length in (1.0, 2.0):
        pcd(torch.tensor([[length**2]], dtype=torch.float64))
    expected = torch.tensor([2.0, 0.75 * 0.25 * 1.0 + 0.25 * 4.0], dtype=torch.float64)
    assert_close(pcd.get_extra_state(), expected)


def test_pcd_survives_a_gramian_that_is_not_finite() -> None:
    used, fresh = PCD(), PCD()
    matrix = make_matrix("random", 3, seed=0)
    used(matrix)
    fresh(matrix)
    assert used(matrix * torch.nan).isnan().all()
    assert torch.equal(used(matrix), fresh(matrix))


def test_pcd_starts_afresh_with_another_number_of_objectives() -> None:
    used = PCD()
    _run(used, range(3), m=4)
    assert torch.equal(_run(used, range(2), m=3), _run(PCD(), range(2), m=3))
    with pytest.raises(ValueError, match="2 entries, but there are 3 secondary"):
        PCD(tau=torch.ones(2))(torch.eye(4))
