"""Mathematical properties of the scalarizers, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from jddist.scalarization import (
    COSMOS,
    DWA,
    FAMO,
    IMTLL,
    PBI,
    STCH,
    UW,
    GeometricMean,
    Mean,
    Random,
    Scalarizer,
    Sum,
)
from tests.unit.scalarization._cases import ALL_NAMES, SHAPES, make, values_of

quick = settings(max_examples=40, deadline=None, derandomize=True)
losses = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=8).map(
    lambda drawn: torch.tensor(drawn, dtype=torch.float64, requires_grad=True)
)
# Losses of any size, zero included, whose sums float32 still holds.
any_losses = st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e30)), min_size=1, max_size=8).map(
    lambda drawn: torch.tensor(drawn, dtype=torch.float64)
)
# Sums of up to 8 terms of size 100, divided by mu = 0.1 and exponentiated.
TOLERANCE = 1e-11


def _trained_dwa(values: Tensor) -> DWA:
    dwa = DWA()
    for epoch in (1.0, 2.0):
        dwa(values.detach().sqrt() ** epoch)
        dwa.step()
    return dwa


def _trained_famo(values: Tensor) -> FAMO:
    famo = FAMO(tuple(values.shape)).double()
    famo(values.detach())
    famo.update(values.detach().sqrt())
    return famo


# Symmetric: no value is preferred, and what is remembered is permuted with the values.
SYMMETRIC: list[Callable[[Tensor], Scalarizer]] = [
    lambda values: Mean(),
    lambda values: Sum(),
    lambda values: GeometricMean(),
    lambda values: STCH(0.1),
    lambda values: COSMOS(0.5, torch.ones_like(values).detach()),
    lambda values: PBI(2.0, torch.ones_like(values).detach()),
    lambda values: UW(tuple(values.shape)),
    lambda values: IMTLL(tuple(values.shape)),
    _trained_dwa,
    _trained_famo,
]


@pytest.mark.parametrize("case", range(len(SYMMETRIC)))
@quick
@given(values=losses, seed=st.integers(0, 1000))
def test_permutation_invariance(case: int, values: Tensor, seed: int) -> None:
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    permuted = values.detach()[order].requires_grad_()
    result = SYMMETRIC[case](values)(values)
    other = SYMMETRIC[case](permuted)(permuted)
    assert_close(other, result, atol=TOLERANCE, rtol=TOLERANCE)
    (gradient,) = torch.autograd.grad(result, values)
    (permuted_gradient,) = torch.autograd.grad(other, permuted)
    # PBI's distance is known to 1e-6 only where it nearly vanishes.
    atol = 1e-6 if isinstance(SYMMETRIC[case](values), PBI) else TOLERANCE
    assert_close(permuted_gradient, gradient[order], atol=atol, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["STCH-full", "COSMOS", "PBI-full", "Constant"])
@pytest.mark.parametrize("seed", range(5))
def test_permuting_preferences_with_values_changes_nothing(name: str, seed: int) -> None:
    values = values_of((7,), seed)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    scalarizer = make(name, (7,))
    result = scalarizer(values)
    scalarizer.weights = scalarizer.weights[order]
    if name.endswith("full"):
        scalarizer.reference = scalarizer.reference[order]
    assert_close(scalarizer(values[order]), result, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["Mean", "Sum", "Constant", "GeometricMean", "PBI", "DWA"])
@quick
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_positive_homogeneity(name: str, factor: float, seed: int) -> None:
    values = values_of((3, 2), seed)
    scalarizer = make(name, (3, 2))
    # 1e-12 under PBI's root changes a distance of 1e-3 by 1e-9; the others only round.
    rtol = 1e-5 if name == "PBI" else 1e-12
    assert_close(scalarizer(factor * values), factor * scalarizer(values), atol=1e-12, rtol=rtol)


@pytest.mark.parametrize("name", ["STCH", "STCH-full"])
@quick
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_stch_is_homogeneous_in_values_reference_and_mu(
    name: str, factor: float, seed: int
) -> None:
    values = values_of((5,), seed)
    scalarizer = make(name, (5,))
    expected = factor * scalarizer(values)
    scalarizer.mu *= factor
    if scalarizer.reference is not None:
        scalarizer.reference = factor * scalarizer.reference
    assert_close(scalarizer(factor * values), expected, atol=1e-12, rtol=1e-11)


@quick
@given(values=losses, seed=st.integers(0, 1000))
def test_gradient_on_the_simplex(values: Tensor, seed: int) -> None:
    scalarizers = [
        Mean(),
        Random(),
        FAMO(tuple(values.shape)),
        _trained_famo(values),
        STCH(0.3, weights=torch.ones_like(values).detach()),
    ]
    torch.manual_seed(seed)
    for scalarizer in scalarizers:
        (gradient,) = torch.autograd.grad(scalarizer(values), values)
        assert (gradient >= 0.0).all()
        # FAMO's logits may be float32, whose softmax has the sum 1 to a few ulp.
        assert abs(float(gradient.sum()) - 1.0) <= 1e-6


@quick
@given(values=losses)
def test_weights_of_dwa_have_the_sum_m(values: Tensor) -> None:
    (gradient,) = torch.autograd.grad(_trained_dwa(values)(values), values)
    assert (gradient > 0.0).all()
    assert_close(gradient.sum(), gradient.new_tensor(float(len(values))))


@quick
@given(values=losses, mu=st.floats(1e-4, 1.0))
def test_stch_is_just_above_the_maximum(values: Tensor, mu: float) -> None:
    result = float(STCH(mu, weights=torch.ones_like(values))(values).detach())
    greatest = float(values.detach().max())
    assert greatest - 1e-9 <= result <= greatest + mu * math.log(len(values)) + 1e-9


@quick
@given(values=losses, seed=st.integers(0, 1000))
def test_pbi_measures_length_and_distance(values: Tensor, seed: int) -> None:
    direction = values_of(tuple(values.shape), seed).detach()
    length = float(PBI(0.0, direction)(values).detach())
    distance = float((PBI(1.0, direction)(values) - length).detach())
    # The root of a square plus 1e-12 is at most 1e-6 off; |l| <= 300 rounds to 1e-13 of its square.
    expected = float(values.detach().norm())
    assert math.hypot(length, distance) == pytest.approx(expected, abs=2e-6, rel=1e-9)
    on_it = (3.0 * direction).requires_grad_()
    (gradient,) = torch.autograd.grad(PBI(5.0, direction)(on_it), on_it)
    # On the direction only rounding, divided by 1e-6, is left of the distance's gradient.
    assert_close(gradient, direction / direction.norm(), atol=1e-7, rtol=0.0)


@quick
@given(values=losses)
def test_uw_at_its_optimum_takes_logarithms(values: Tensor) -> None:
    """Minimizing over s gives s = log l, where the scalar is the sum of (1 + log l) / 2."""
    uw = UW(tuple(values.shape)).double()
    with torch.no_grad():
        uw.log_var.copy_(values.log())
    result = uw(values)
    assert_close(result, (0.5 + 0.5 * values.log()).sum())
    (gradient,) = torch.autograd.grad(result, uw.log_var)
    assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0.0)


@quick
@given(values=losses)
def test_imtll_at_its_optimum_scales_all_values_to_one(values: Tensor) -> None:
    imtll = IMTLL(tuple(values.shape)).double()
    with torch.no_grad():
        imtll.log_scale.copy_(-values.log())
    gradients = torch.autograd.grad(imtll(values), [imtll.log_scale, values])
    assert_close(gradients[0], torch.zeros_like(gradients[0]), atol=1e-12, rtol=0.0)
    assert_close(gradients[1] * values, torch.ones_like(values))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ALL_NAMES)
@quick
@given(drawn=any_losses, later=any_losses)
def test_finite_on_finite_values(
    name: str, dtype: torch.dtype, drawn: Tensor, later: Tensor
) -> None:
    """Zeros, tiny and huge losses: neither the scalar, nor its gradient, nor the state breaks."""
    assume(not (name.startswith("COSMOS") and float(drawn.norm()) == 0.0))
    shape = tuple(drawn.shape)
    scalarizer = make(name, shape, dtype)
    if name.endswith("full"):
        scalarizer.reference = scalarizer.min_losses = torch.zeros(shape, dtype=dtype)
    later = later.new_full(shape, float(later[0]))
    if name.startswith("PBI") and dtype == torch.float32:
        drawn, later = drawn.clamp(max=1e15), later.clamp(max=1e15)  # It squares them.
    for values in (drawn, later, drawn):
        values = values.to(dtype).clone().requires_grad_()
        result = scalarizer(values)
        result.backward()
        assert result.isfinite()
        assert values.grad is not None and values.grad.isfinite().all()
        if isinstance(scalarizer, DWA):
            scalarizer.step()
        if isinstance(scalarizer, FAMO):
            scalarizer.update(later.to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ALL_NAMES)
def test_the_shape_does_not_matter(name: str, shape: tuple[int, ...]) -> None:
    values = values_of(shape, 3)
    torch.manual_seed(0)
    expected = make(name, shape)(values)
    flat = make(name, (values.numel(),))
    torch.manual_seed(0)
    assert_close(flat(values.flatten()), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("values", [[0.0], [0.0, 2.0], [0.0, 0.0, 3.0]])
def test_geometric_mean_at_zero_has_no_gradient(values: list[float]) -> None:
    tensor = torch.tensor(values, requires_grad=True)
    result = GeometricMean()(tensor)
    (gradient,) = torch.autograd.grad(result, tensor)
    assert result == 0.0
    assert torch.equal(gradient, torch.zeros(len(values)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ALL_NAMES)
def test_nan_and_infinity_are_not_hidden(name: str, bad: float) -> None:
    values = torch.tensor([1.0, bad, 2.0], dtype=torch.float64)
    assert not make(name, (3,))(values).isfinite()


def test_dwa_takes_the_limit_at_averages_of_zero() -> None:
    dwa = DWA(temperature=0.5)
    for values in ([0.0, 1.0, 4.0], [0.0, 1.0, 2.0]):
        dwa(torch.tensor(values))
        dwa.step()
    values = torch.ones(3, requires_grad=True)
    (weights,) = torch.autograd.grad(dwa(values), values)
    assert_close(weights, 3.0 * torch.tensor([2.0, 2.0, 1.0]).softmax(dim=0))
    dwa(torch.tensor([7.0, 1.0, 2.0]))
    dwa.step()
    values = torch.ones(3, requires_grad=True)
    (weights,) = torch.autograd.grad(dwa(values), values)
    assert torch.equal(weights, torch.tensor([3.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    "act",
    [
        lambda: PBI(1.0, torch.zeros(2)),
        lambda: FAMO(2)(torch.tensor([1.0, -0.1])),
        lambda: FAMO(2, min_losses=torch.tensor([2.0, 0.0]))(torch.ones(2)),
        lambda: IMTLL(-1),
        lambda: UW((2, -3)),
        lambda: STCH(math.nan),
        lambda: DWA(math.nan),
    ],
)
def test_what_the_peer_lets_pass_is_refused(act: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="Found"):
        act()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_famo_never_learns_from_impossible_values(bad: float) -> None:
    famo = FAMO(2)
    famo(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="Found"):
        famo.update(torch.tensor([0.5, bad]))
    assert torch.equal(famo._w, torch.zeros(2))
    famo.update(torch.tensor([0.5, 2.0]))
    assert famo._w[0] < famo._w[1]


def test_famo_lifts_the_logit_of_what_decreased_least() -> None:
    famo = FAMO(3, lr=0.1, weight_decay=0.0)
    famo(torch.ones(3))
    famo.update(torch.tensor([0.1, 0.5, 1.0]))
    values = torch.ones(3, requires_grad=True)
    (weights,) = torch.autograd.grad(famo(values), values)
    assert weights[0] < weights[2]


def test_a_changed_bound_needs_the_shape_of_the_values() -> None:
    famo = FAMO(3)
    famo.min_losses = torch.zeros(1)
    with pytest.raises(ValueError, match="min_losses"):
        famo(torch.ones(3))
