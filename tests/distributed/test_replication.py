"""What a weighting leaves behind on rank 0 is on every rank: its state, and the random stream."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Partial

from jddist import attach
from jddist.aggregation import (
    Flattening,
    GradDrop,
    GradVacWeighting,
    PCGradWeighting,
    RandomWeighting,
    Weighting,
)
from jddist.autogram import Engine
from jddist.autojac import backward
from jddist.errors import LayoutMismatchError
from tests._ranks import run_ranks
from tests.distributed._training import LOSSES, local_part, make_data, make_network, wrap

WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "GradVac": GradVacWeighting,
    "PCGrad": PCGradWeighting,
    "Random": RandomWeighting,
}


def _steps(rank: int, world_size: int, seeded_alike: bool) -> dict[str, list[Tensor]]:
    found = {}
    for name, weighting_class in WEIGHTINGS.items():
        ddp = wrap(make_network())
        torch.manual_seed(7 if seeded_alike else 7 + rank)
        engine = Engine(ddp, batch_dim=0)
        x, y = (local_part(t, rank, world_size, "even") for t in make_data())
        weighting = weighting_class()
        weights = [engine.backward(LOSSES["instance"](ddp(x), y), weighting) for _ in range(3)]
        state = weighting.state_dict()
        extra = [v for v in state.values() if isinstance(v, Tensor)]
        found[name] = [*weights, *extra, torch.rand(3)]
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_equally_seeded_ranks_stay_equal_to_one_process(world_size: int) -> None:
    (one,) = run_ranks(_steps, 1, True)
    for found in run_ranks(_steps, world_size, True):
        for name, expected in one.items():
            assert len(found[name]) == len(expected) == (5 if name == "GradVac" else 4)
            for got, want in zip(found[name], expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=name)


def test_differently_seeded_ranks_get_the_same_weights_and_keep_their_streams() -> None:
    ranks = run_ranks(_steps, 2, False)
    for name in WEIGHTINGS:
        first, second = (found[name] for found in ranks)
        assert all(torch.equal(a, b) for a, b in zip(first[:-1], second[:-1], strict=True)), name
        assert not torch.equal(first[-1], second[-1]), name


def _own_generators(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    found = {}
    for name, weighting_class in WEIGHTINGS.items():
        ddp = wrap(make_network())
        torch.manual_seed(7)
        untouched = torch.get_rng_state()
        engine = Engine(ddp, batch_dim=0)
        x, y = (local_part(t, rank, world_size, "even") for t in make_data())
        weighting = weighting_class(generator=torch.Generator().manual_seed(5 + rank))
        found[name] = [engine.backward(LOSSES["instance"](ddp(x), y), weighting) for _ in range(3)]
        found[name] += [v for v in weighting.state_dict().values() if isinstance(v, Tensor)]
        assert torch.equal(torch.get_rng_state(), untouched)
    return found


def test_rank_zeros_generator_counts_and_is_on_every_rank() -> None:
    (one,) = run_ranks(_own_generators, 1)
    for found in run_ranks(_own_generators, 3):
        for name, expected in one.items():
            assert len(found[name]) == len(expected) == (5 if name == "GradVac" else 4)
            for got, want in zip(found[name], expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=name)


def _drop(rank: int, world_size: int, alike: bool) -> list[Tensor]:
    ddp = wrap(make_network())
    attach(ddp, objectives=Partial("avg"))
    x, y = (local_part(t, rank, world_size, "even") for t in make_data())
    drop = GradDrop(generator=torch.Generator().manual_seed(5 if alike else 5 + rank))
    for _ in range(2):
        losses = [(ddp(x)[:, task] - y[:, task]).square().mean() for task in range(2)]
        backward(losses, drop, inputs=list(ddp.parameters()))
    return [p.grad for p in ddp.parameters() if p.grad is not None]


def test_column_wise_draws_need_the_same_generator_on_every_rank() -> None:
    (one,) = run_ranks(_drop, 1, True)
    for found in run_ranks(_drop, 3, True):
        for got, want in zip(found, one, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    with pytest.raises(LayoutMismatchError, match="settings of the aggregators"):
        run_ranks(_drop, 3, False)


def _wrapped_state(rank: int, world_size: int) -> Tensor:
    ddp = wrap(make_network())
    engine = Engine(ddp, batch_dim=0)
    x, y = (local_part(t, rank, world_size, "even") for t in make_data())
    weighting = Flattening(GradVacWeighting())
    engine.backward(LOSSES["instance x task"](ddp(x), y), weighting)
    (state,) = (v for v in weighting.state_dict().values() if isinstance(v, Tensor))
    return state


def test_the_state_of_a_wrapped_weighting_follows_too() -> None:
    first, second = run_ranks(_wrapped_state, 2)
    assert first.shape == (36, 36) and first.any()
    assert torch.equal(first, second)
