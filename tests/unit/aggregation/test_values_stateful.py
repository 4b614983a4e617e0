"""The formulas of the papers, written out slowly, for methods with a memory or a mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from jddist.aggregation import (
    DBMTL,
    CRMOGMWeighting,
    ExcessMTL,
    ExcessMTLWeighting,
    GradDrop,
    GradNorm,
    GradNormWeighting,
    GramianWeightedAggregator,
    MeanWeighting,
    MoCo,
    MoDoWeighting,
    SDMGradWeighting,
    SumWeighting,
    TrimmedMean,
    UPGradWeighting,
    WeightedAggregator,
    _graddrop,
)
from jddist.aggregation._columns import WholeColumns, acting_on
from jddist.aggregation._simplex import project
from jddist.autojac import backward
from tests.unit.aggregation._matrices import make_matrix

quick = settings(max_examples=60, deadline=None, derandomize=True)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _project_by_bisection(point: Tensor) -> Tensor:
    low, high = float(point.max()) - 1.0, float(point.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (point - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (point - low).clamp(min=0)


@quick
@given(st.lists(st.integers(-40, 40), min_size=1, max_size=8))
def test_projection_onto_the_simplex(quarters: list[int]) -> None:
    point = torch.tensor(quarters, dtype=torch.float64) / 4
    weights = project(point)
    assert_close(weights, _project_by_bisection(point), rtol=0.0, atol=1e-12)
    assert_close(project(weights), weights, rtol=0.0, atol=1e-15)


def test_a_huge_point_projects_to_a_vertex() -> None:
    for dtype in (torch.float32, torch.float64):
        point = torch.tensor([-1e30, 1e30, 0.0], dtype=dtype)
        assert project(point).isfinite().all()


def test_trimmed_mean_by_hand() -> None:
    matrix = torch.tensor([[1.0, 9.0], [2.0, -9.0], [30.0, 1.0], [4.0, 2.0], [-50.0, 3.0]])
    assert_close(TrimmedMean(1)(matrix), torch.tensor([7.0 / 3.0, 2.0]))
    assert_close(TrimmedMean(2)(matrix), torch.tensor([2.0, 2.0]))
    assert_close(TrimmedMean(0)(matrix), matrix.mean(dim=0))


def test_graddrop_by_hand() -> None:
    matrix = torch.tensor([[3.0, 3.0, 1.0, 0.0], [-1.0, -1.0, 2.0, 0.0]])
    # The purities are 3/4, 3/4, 1 and undefined.
    draws = torch.tensor([0.7, 0.8, 0.9, 0.5])
    leaking = GradDrop(leak=torch.tensor([0.0, 0.5]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: draws)
        assert_close(GradDrop()(matrix), torch.tensor([3.0, -1.0, 3.0, 0.0]))
        assert_close(leaking(matrix), torch.tensor([2.5, -1.0, 3.0, 0.0]))


def test_graddrop_draws_the_same_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = make_matrix("random", 3, seed=0, n=1000)
    results = []
    for chunk in (1 << 20, 1000, 999, 64, 7):
        monkeypatch.setattr(_graddrop, "CHUNK", chunk)
        torch.manual_seed(0)
        results.append((GradDrop()(matrix), torch.rand(1)))
    for vector, following in results[1:]:
        assert torch.equal(vector, results[0][0])
        assert torch.equal(following, results[0][1])


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("sizes", [[6, 5], [1, 0, 10], [3, 4, 4, 0]], ids=str)
@pytest.mark.parametrize("scattered", [False, True])
def test_graddrop_does_not_depend_on_the_shards(
    device: str, sizes: list[int], scattered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_graddrop, "CHUNK", 4)
    monkeypatch.setattr(_graddrop, "AT_ONCE", 3)
    matrix = make_matrix("random", 3, seed=0).to(device)

    n = matrix.shape[1]
    order = torch.arange(n)
    if scattered:  # each shard ascending, but not without gaps
        order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    shards = [shard.sort().values for shard in order.split(sizes)]

    class Part(WholeColumns):
        def __init__(self, places: Tensor) -> None:
            self.places = places

        def total(self, width: int) -> int:
            return n

        def among(self, width: int, first: int, last: int) -> tuple[slice, slice | Tensor]:
            low, high = torch.searchsorted(self.places, torch.tensor([first, last])).tolist()
            return slice(low, high), self.places[low:high] - first

    torch.manual_seed(0)
    whole, following = GradDrop()(matrix), torch.rand(3, device=device)
    for places in shards:
        torch.manual_seed(0)
        with acting_on(Part(places)):
            part = GradDrop()(matrix[:, places.to(device)])
        assert torch.equal(part, whole[places.to(device)])
        assert torch.equal(torch.rand(3, device=device), following)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rand_in_chunks_is_rand(dtype: torch.dtype) -> None:
    """What GradDrop relies on, on the CPU."""
    torch.manual_seed(0)
    whole = torch.rand(10_007, dtype=dtype)
    torch.manual_seed(0)
    sizes = [1, 15, 16, 17, 1000, 8958]
    assert torch.equal(torch.cat([torch.rand(n, dtype=dtype) for n in sizes]), whole)


def test_excess_mtl_by_hand() -> None:
    first, second = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[4.0, 3.0], [2.0, 0.0]])
    weighting = ExcessMTLWeighting(robust_step_size=0.1, n_warmup_steps=1)
    assert_close(weighting(first), torch.tensor([0.5, 0.5]))
    # Baselines |J_ij| summed: 7 and 2; then 16/5 + 9/5 = 5 and 4/2 = 2.
    logits = torch.tensor([0.1 * 5 / 7, 0.1 * 2 / 2])
    assert_close(weighting(second), logits.softmax(dim=0), rtol=1e-6, atol=1e-6)


def test_excess_mtl_saturates_instead_of_overflowing() -> None:
    weighting = ExcessMTLWeighting()
    weighting(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    for _ in range(3):
        weights = weighting(torch.tensor([[1e3, 1e3], [1.0, 1.0]]))
        assert_close(weights, torch.tensor([1.0, 0.0]))


def test_a_weighting_of_jacobians_takes_no_gramian() -> None:
    for weighting in (ExcessMTLWeighting(), CRMOGMWeighting(ExcessMTLWeighting())):
        with pytest.raises(ValueError, match="WeightedAggregator"):
            GramianWeightedAggregator(weighting)


def test_crmogm_by_hand() -> None:
    matrix = torch.ones(2, 3, dtype=torch.float64)
    weighting = CRMOGMWeighting(SumWeighting(), alpha=0.75, initial_weights=tensor(5.0, 1.0))
    assert_close(weighting(matrix), tensor(4.0, 1.0))
    assert_close(weighting(matrix), tensor(3.25, 1.0))
    weighting.alpha = 0.0
    assert_close(weighting(matrix), tensor(1.0, 1.0))
    weighting.reset()
    weighting.alpha = 1.0
    assert_close(weighting(matrix), tensor(5.0, 1.0))


def test_crmogm_keeps_no_graph_of_earlier_calls() -> None:
    aggregator = WeightedAggregator(CRMOGMWeighting(MeanWeighting()))
    for _ in range(2):
        matrix = make_matrix("random", 3, seed=0).requires_grad_()
        aggregator(matrix).sum().backward()
        assert_close(matrix.grad, torch.full_like(matrix, 1 / 3))


def test_modo_by_hand() -> None:
    products = torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.float64)
    weighting = MoDoWeighting(gamma=0.5, rho=0.2)
    # From (1/2, 1/2): the slope is (0.1, 1.35), the step ends at (0.45, -0.175).
    assert_close(weighting(products), tensor(0.8125, 0.1875))


def test_sdmgrad_by_hand() -> None:
    products = torch.tensor([[4.0, 0.0], [1.0, 4.0]], dtype=torch.float64)
    weighting = SDMGradWeighting(lr=0.2, momentum=0.5, n_iter=2, lambda_=1.0)
    # Scaled by 1/4: [[1, 0], [1/4, 1]]. w + v is (1, 1), the first step u = (1, 1.25).
    first = project(tensor(0.5 - 0.2, 0.5 - 0.25))
    step = 0.5 * tensor(1.0, 1.25) + products / 4 @ (first + 0.5)
    second = project(first - 0.2 * step)
    assert_close(weighting(products), (second + 0.5) / 2, rtol=1e-7, atol=1e-7)


def _gradnorm_step(
    weights: Tensor, lengths: Tensor, ratios: Tensor, alpha: float, lr: float
) -> Tensor:
    weights = weights.clone().requires_grad_()
    norms = weights * lengths
    targets = (norms.mean() * (ratios / ratios.mean()) ** alpha).detach()
    (norms - targets).abs().sum().backward()
    stepped = weights.detach() - lr * weights.grad  # type: ignore[operator]
    return stepped * len(weights) / stepped.sum()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_gradnorm_is_the_papers_algorithm(alpha: float) -> None:
    aggregator = GradNorm(alpha=alpha, lr=0.01)
    weights = torch.ones(4, dtype=torch.float64)
    first = tensor(1.0, 2.0, 4.0, 3.0)
    for call in range(8):
        jacobian = make_matrix("random", 4, call)
        losses = first * (1.0 + 0.1 * torch.sin(first * call))
        aggregator.set_losses(losses)
        assert_close(aggregator(jacobian), weights @ jacobian, rtol=1e-12, atol=1e-12)
        weights = _gradnorm_step(weights, jacobian.norm(dim=1), losses / first, alpha, 0.01)


def test_gradnorm_evens_out_the_lengths() -> None:
    aggregator, jacobian = GradNorm(alpha=0.0, lr=1e-3), make_matrix("badly scaled", 3, seed=0)
    jacobian = jacobian / jacobian.norm() * 3
    for _ in range(4000):
        aggregator.set_losses(torch.ones(3))
        aggregator(jacobian)
    jacobian_lengths = jacobian.norm(dim=1)
    aggregator.set_losses(torch.ones(3))
    weights = aggregator.gramian_weighting(jacobian @ jacobian.T)
    lengths = weights * jacobian_lengths
    assert float(lengths.max() / lengths.min()) < 0.1 * float(
        jacobian_lengths.max() / jacobian_lengths.min()
    )


def test_moco_is_the_papers_algorithm() -> None:
    aggregator = MoCo(beta=0.3, gamma=0.2, rho=0.1)
    tracked, weights = torch.zeros(4, 11, dtype=torch.float64), torch.full((4,), 0.25).double()
    for call in range(6):
        jacobian = make_matrix("conflicting", 4, call)
        tracked = tracked - 0.3 * (tracked - jacobian)
        slope = (tracked @ tracked.T + 0.1 * torch.eye(4)) @ weights
        weights = _project_by_bisection(weights - 0.2 * slope)
        assert_close(aggregator(jacobian), weights @ tracked, rtol=1e-10, atol=1e-10)


def test_db_mtl_differentiates_the_logarithms() -> None:
    """Against autograd on log(losses), the way the paper states it."""
    torch.manual_seed(0)
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    maps = torch.randn(3, 5, 5, dtype=torch.float64)
    aggregator = DBMTL(beta=0.75)
    averages = torch.zeros(3, 5, dtype=torch.float64)
    for _ in range(4):
        losses = (maps @ x).square().sum(dim=1)
        logs = (losses + 1e-8).log()
        rows = [torch.autograd.grad(log, x, retain_graph=True)[0] for log in logs]
        averages = 0.75 * averages + 0.25 * torch.stack(rows)
        lengths = averages.norm(dim=1)
        expected = (lengths.max() / (lengths + 1e-8)) @ averages
        aggregator.set_losses(losses)
        x.grad = None
        backward(losses, aggregator)
        assert_close(x.grad, expected, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            x -= 0.01 * expected


@pytest.mark.parametrize("make", [GradNorm, GradNormWeighting, DBMTL])
def test_losses_are_stated_for_every_call(make: type[GradNorm | GradNormWeighting | DBMTL]) -> None:
    method, square = make(), torch.eye(3)
    with pytest.raises(ValueError, match="set_losses"):
        method(square)
    method.set_losses(torch.ones(3))
    method(square)
    with pytest.raises(ValueError, match="set_losses"):
        method(square)
    method.set_losses(torch.ones(2))
    with pytest.raises(ValueError, match="2 losses and 3 objectives"):
        method(square)
    for bad in (torch.ones(3, 1), tensor(1.0, -1.0), tensor(float("nan")), tensor(float("inf"))):
        with pytest.raises(ValueError, match="losses"):
            method.set_losses(bad)


@pytest.mark.parametrize(
    ("method", "name", "good", "bad"),
    [
        (GradNorm(), "alpha", 0.5, [-0.1]),
        (GradNorm(), "lr", 0.5, [0.0]),
        (MoCo(), "beta", 1.0, [0.0, 1.1]),
        (MoCo(), "gamma", 0.5, [0.0]),
        (MoCo(), "rho", 0.5, [-0.1]),
        (DBMTL(), "beta", 0.0, [-0.1, 1.0]),
        (ExcessMTL(), "robust_step_size", 0.5, [0.0]),
    ],
)
def test_hyperparameters(method: torch.nn.Module, name: str, good: float, bad: list[float]) -> None:
    setattr(method, name, good)
    for value in bad:
        with pytest.raises(ValueError, match=name):
            setattr(method, name, value)
    assert getattr(method, name) == good


@pytest.mark.parametrize(
    ("method", "long", "short"),
    [
        (GradNorm(), "GradNorm(alpha=1.5, lr=0.025)", "GradNorm"),
        (MoCo(), "MoCo(beta=0.5, gamma=0.1, rho=0.0)", "MoCo"),
        (DBMTL(), "DBMTL(beta=0.9)", "DBMTL"),
        (ExcessMTL(), "ExcessMTL(robust_step_size=1.0, n_warmup_steps=0)", "ExcessMTL"),
    ],
    ids=lambda v: str(v)[:8],
)
def test_texts(method: torch.nn.Module, long: str, short: str) -> None:
    assert repr(method) == long
    assert str(method) == short


@pytest.mark.parametrize("weighting", [MoDoWeighting(), SDMGradWeighting()])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 3, 2)])
def test_products_of_two_batches_are_square(
    weighting: MoDoWeighting | SDMGradWeighting, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="cross_gramian"):
        weighting(torch.ones(shape))


def test_crmogm_shows_what_it_wraps() -> None:
    text = repr(CRMOGMWeighting(UPGradWeighting(), alpha=0.5))
    assert "UPGradWeighting" in text and "alpha=0.5" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradnorm_pulls_an_objective_whose_first_loss_was_zero(dtype: torch.dtype) -> None:
    weighting = GradNormWeighting(lr=0.1)
    gramian = torch.eye(2, dtype=dtype)
    for losses in ([0.0, 1.0], [20.0, 1.0], [20.0, 1.0], [20.0, 1.0]):
        weighting.set_losses(torch.tensor(losses))
        weights = weighting(gramian)
    # The first has the loss 0 and is pushed down once; then its relative loss is beyond any bound.
    assert weights[0] > 1.0 > weights[1]
