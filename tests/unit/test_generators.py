"""Random methods with a generator of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor, nn

from jddist import aggregation, scalarization

M = 5

METHODS: dict[str, tuple[Callable[..., nn.Module], Callable[[Tensor], Tensor]]] = {
    "Random": (aggregation.Random, lambda j: j),
    "RandomWeighting": (aggregation.RandomWeighting, lambda j: j @ j.T),
    "PCGrad": (aggregation.PCGrad, lambda j: j),
    "PCGradWeighting": (aggregation.PCGradWeighting, lambda j: j @ j.T),
    "GradVac": (aggregation.GradVac, lambda j: j),
    "GradVacWeighting": (aggregation.GradVacWeighting, lambda j: j @ j.T),
    "GradDrop": (aggregation.GradDrop, lambda j: j),
    "CRMOGMWeighting": (
        lambda generator=None: aggregation.CRMOGMWeighting(
            aggregation.RandomWeighting(generator=generator)
        ),
        lambda j: j @ j.T,
    ),
    "scalarization.Random": (scalarization.Random, lambda j: j.sum(1)),
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> tuple[Callable[..., nn.Module], Tensor]:
    make, given = METHODS[request.param]
    jacobian = torch.randn(M, 7, generator=Generator().manual_seed(1), dtype=torch.float64)
    return make, given(jacobian)


def test_the_same_numbers_as_the_default_generator(
    method: tuple[Callable[..., nn.Module], Tensor],
) -> None:
    make, given = method
    torch.manual_seed(3)
    by_default = make()
    expected = [by_default(given) for _ in range(3)]
    torch.manual_seed(4)
    untouched = torch.get_rng_state()
    own = make(generator=Generator().manual_seed(3))
    for want in expected:
        torch.testing.assert_close(own(given), want, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), untouched)
    assert not torch.equal(expected[0], expected[1])  # it does draw


def test_the_stream_is_saved_and_goes_on(
    method: tuple[Callable[..., nn.Module], Tensor],
) -> None:
    make, given = method
    first = make(generator=Generator().manual_seed(3))
    first(given)
    state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in first.state_dict().items()}
    expected = [first(given) for _ in range(2)]
    seeded, fresh = make(generator=Generator()), make()
    for other in (seeded, fresh):
        other.load_state_dict(state)
        for want in expected:
            torch.testing.assert_close(other(given), want, rtol=0, atol=0)


def test_a_missing_state_is_an_error(method: tuple[Callable[..., nn.Module], Tensor]) -> None:
    make, _ = method
    state = make().state_dict()
    assert not any(key.endswith("generator") for key in state)
    seeded = make(generator=Generator())
    with pytest.raises(RuntimeError, match="Missing key.*generator"):
        seeded.load_state_dict(state)
    seeded.load_state_dict(state, strict=False)
