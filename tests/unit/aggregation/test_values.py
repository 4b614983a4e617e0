"""Documented numbers, hyperparameters, and texts of every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from jddist import aggregation
from jddist.aggregation import (
    IMTLG,
    MGDA,
    PCD,
    Aggregator,
    AlignedMTL,
    AlignedMTLWeighting,
    CAGrad,
    CAGradWeighting,
    ConFIG,
    Constant,
    ConstantWeighting,
    DualProj,
    DualProjWeighting,
    FairGrad,
    FairGradWeighting,
    GradVac,
    GradVacWeighting,
    GramianWeightedAggregator,
    IMTLGWeighting,
    Krum,
    KrumWeighting,
    Mean,
    MGDAWeighting,
    NashMTL,
    PCGrad,
    PCGradWeighting,
    Random,
    Sum,
    SumWeighting,
    UPGrad,
    UPGradWeighting,
    Weighting,
)
from jddist.linalg import QuadprogProjector

JACOBIAN = tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])

VECTORS = [
    (AlignedMTL(), [0.2133, 0.9673, 0.9673]),
    (CAGrad(c=0.5), [0.1835, 1.2041, 1.2041]),
    (ConFIG(), [0.1588, 2.0706, 2.0706]),
    (FairGrad(alpha=1.0), [0.0766, 0.9985, 0.9985]),
    (IMTLG(), [0.0767, 1.0000, 1.0000]),
    (NashMTL(n_tasks=2), [0.0542, 0.7061, 0.7061]),
    (Constant(tensor([1.0, 2.0])), [8.0, 3.0, 3.0]),
    (DualProj(), [0.5563, 1.1109, 1.1109]),
    (GradVac(), [0.5848, 3.8012, 3.8012]),
    (Mean(), [1.0, 1.0, 1.0]),
    (MGDA(), [0.0, 1.0, 1.0]),
    (PCGrad(), [0.5848, 3.8012, 3.8012]),
    (Sum(), [2.0, 2.0, 2.0]),
    (UPGrad(), [0.2929, 1.9004, 1.9004]),
]
WEIGHTS = [
    (AlignedMTLWeighting(), [0.5591, 0.4083]),
    (CAGradWeighting(c=0.5), [0.7041, 0.5000]),
    (FairGradWeighting(alpha=1.0), [0.5915, 0.4071]),
    (IMTLGWeighting(), [0.5923, 0.4077]),
    (ConstantWeighting(tensor([1.0, 2.0])), [1.0, 2.0]),
    (DualProjWeighting(), [0.6109, 0.5000]),
    (GradVacWeighting(), [2.2222, 1.5789]),
    (MGDAWeighting(), [0.6000, 0.4000]),
    (PCGradWeighting(), [2.2222, 1.5789]),
    (SumWeighting(), [1.0, 1.0]),
    (UPGradWeighting(), [1.1109, 0.7894]),
]


# The documents print four digits.
@pytest.mark.parametrize(("aggregator", "expected"), VECTORS, ids=lambda v: str(v)[:12])
def test_documented_vectors(aggregator: Aggregator, expected: list[float]) -> None:
    assert_close(aggregator(JACOBIAN), tensor(expected), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize(("weighting", "expected"), WEIGHTS, ids=lambda v: type(v).__name__)
def test_documented_weights(weighting: Weighting, expected: list[float]) -> None:
    assert_close(weighting(JACOBIAN @ JACOBIAN.T), tensor(expected), rtol=0.0, atol=1e-4)


def test_documented_krum() -> None:
    adversarial = tensor([75.0, -666.0, 23.0])
    rows = tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 2.0, 3.0], [2.0, 0.0, 1.0]])
    jacobian = torch.cat([rows[:2], adversarial[None], rows[2:]])
    expected = tensor([0.25, 0.25, 0.0, 0.25, 0.25])
    assert torch.equal(KrumWeighting(1, 4)(jacobian @ jacobian.T), expected)
    assert_close(Krum(1, 4)(jacobian), tensor([1.25, 0.75, 1.5]))


def test_pcd_promises_a_share() -> None:
    # The second gradient is at a right angle: a share of 0.5 along it, then the first one's length.
    direction = tensor([1.0, 0.5], dtype=torch.float64)
    result = PCD(tau=0.5, eps=0.0)(tensor([[3.0, 0.0], [0.0, 7.0]], dtype=torch.float64))
    assert_close(result, 3.0 * direction / direction.norm())


def test_every_method_has_an_aggregator_and_a_weighting() -> None:
    methods = [n for n in aggregation.__all__ if n + "Weighting" in aggregation.__all__]
    assert len(methods) >= 9
    for name in methods:
        assert issubclass(getattr(aggregation, name), Aggregator)
        assert issubclass(getattr(aggregation, name + "Weighting"), Weighting)


PROJECTOR = "projector=AutomaticProjector(norm_eps=0.0001, reg_eps=0.0001)"


@pytest.mark.parametrize(
    ("aggregator", "long", "short"),
    [
        (Mean(), "Mean()", "Mean"),
        (Sum(), "Sum()", "Sum"),
        (Random(), "Random()", "Random"),
        (PCGrad(), "PCGrad()", "PCGrad"),
        (MGDA(), "MGDA(epsilon=0.001, max_iters=100)", "MGDA"),
        (GradVac(), "GradVac(beta=0.5, eps=1e-08)", "GradVac"),
        (UPGrad(), f"UPGrad(pref_vector=None, {PROJECTOR})", "UPGrad"),
        (
            DualProj(tensor([1.0, 2.5])),
            f"DualProj(pref_vector=tensor([1.0000, 2.5000]), {PROJECTOR})",
            "DualProj([1., 2.5])",
        ),
        (
            AlignedMTL(tensor([1.0, 2.0])),
            "AlignedMTL(pref_vector=tensor([1., 2.]), scale_mode='min')",
            "AlignedMTL([1., 2.])",
        ),
        (CAGrad(c=0.5), "CAGrad(c=0.5, norm_eps=0.0001)", "CAGrad0.5"),
        (CAGrad(c=2.0), "CAGrad(c=2.0, norm_eps=0.0001)", "CAGrad2"),
        (ConFIG(), "ConFIG(pref_vector=None)", "ConFIG"),
        (FairGrad(0.1), "FairGrad(alpha=0.1, max_iters=None)", "0.1-FairGrad"),
        (IMTLG(), "IMTLG()", "IMTLG"),
        (Krum(1, 2), "Krum(n_byzantine=1, n_selected=2)", "Krum1-2"),
        (
            NashMTL(2, max_norm=1.5, update_weights_every=2, optim_niter=5),
            "NashMTL(n_tasks=2, max_norm=1.5, update_weights_every=2, optim_niter=5)",
            "NashMTL",
        ),
        (PCD(), "PCD(tau=0.02, beta=0.999, eps=1e-08)", "PCD"),
        (Constant(tensor([1.0, 2.0])), "Constant(weights=tensor([1., 2.]))", "Constant([1., 2.])"),
    ],
    ids=str,
)
def test_texts(aggregator: Aggregator, long: str, short: str) -> None:
    assert repr(aggregator) == long
    assert str(aggregator) == short


@pytest.mark.parametrize(
    ("aggregator", "name", "good", "bad"),
    [
        (MGDA(), "epsilon", 0.25, [0.0, -1.0]),
        (MGDA(), "max_iters", 7, [0, -1]),
        (GradVac(), "beta", 0.25, [-0.1, 1.1]),
        (GradVac(), "eps", 0.5, [-1e-9]),
        (UPGrad(), "pref_vector", tensor([1.0, 2.0]), [tensor(1.0), torch.ones(2, 2)]),
        (DualProj(), "pref_vector", tensor([1.0, 2.0]), [tensor(1.0), torch.ones(2, 2)]),
        (AlignedMTL(), "pref_vector", tensor([1.0, 2.0]), [tensor(1.0), torch.ones(2, 2)]),
        (AlignedMTL(), "scale_mode", "rmse", ["mean", ""]),
        (CAGrad(0.5), "c", 1.25, [-1e-9, float("nan")]),
        (CAGrad(0.5), "norm_eps", 0.25, [-1e-9, float("nan")]),
        (ConFIG(), "pref_vector", tensor([1.0, 2.0]), [tensor(1.0), torch.ones(2, 2)]),
        (FairGrad(1.0), "alpha", 0.0, [-0.5, float("inf"), float("nan")]),
        (FairGrad(1.0), "max_iters", 50, [0, -1]),
        (Krum(1), "n_byzantine", 3, [-1]),
        (Krum(1), "n_selected", 3, [0, -1]),
        (NashMTL(2), "n_tasks", 4, [0, -1]),
        (NashMTL(2), "max_norm", 2.5, [-1e-9, float("nan")]),
        (NashMTL(2), "update_weights_every", 3, [0]),
        (NashMTL(2), "optim_niter", 7, [0]),
        (PCD(), "tau", tensor([0.0, 1.0]), [-0.1, 1.1, tensor(0.5), tensor([0.5, 1.5])]),
        (PCD(), "beta", 0.0, [-0.1, 1.0]),
        (PCD(), "eps", 0.0, [-1e-9, float("nan")]),
        (UPGrad(), "projector", QuadprogProjector(norm_eps=0), []),
        (DualProj(), "projector", QuadprogProjector(norm_eps=0), []),
    ],
)
def test_hyperparameters_live_on_the_weighting(
    aggregator: GramianWeightedAggregator, name: str, good: Any, bad: list[Any]
) -> None:
    setattr(aggregator, name, good)
    assert getattr(aggregator, name) is good
    assert getattr(aggregator.gramian_weighting, name) is good
    for value in bad:
        with pytest.raises(ValueError, match=name):
            setattr(aggregator, name, value)
        with pytest.raises(ValueError, match=name):
            setattr(aggregator.gramian_weighting, name, value)
    assert getattr(aggregator, name) is good


def test_preference_vector_becomes_a_weighting() -> None:
    upgrad = UPGrad()
    preference = tensor([1.0, 2.0])
    upgrad.pref_vector = preference
    inner = upgrad.gramian_weighting.weighting
    assert isinstance(inner, ConstantWeighting)
    assert inner.weights is preference
    upgrad.pref_vector = None
    assert_close(upgrad(JACOBIAN), UPGrad()(JACOBIAN))
    upgrad.projector = None
    assert isinstance(upgrad.projector, QuadprogProjector)


@pytest.mark.parametrize("make", [Constant, UPGrad, DualProj, AlignedMTL, ConFIG])
def test_one_weight_per_objective(make: Any) -> None:
    with pytest.raises(ValueError, match="3 constant weights, but 2 objectives"):
        make(torch.ones(3))(JACOBIAN)


@pytest.mark.parametrize("weights", [tensor(1.0), torch.ones(2, 1)])
def test_constant_weights_are_a_vector(weights: Tensor) -> None:
    with pytest.raises(ValueError, match="vector"):
        Constant(weights)


def test_constant_weights_follow_the_dtype() -> None:
    assert Constant(torch.ones(2))(JACOBIAN.double()).dtype == torch.float64
