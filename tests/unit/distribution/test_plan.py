"""Planning is pure: no process group, any number of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jddist.distribution.collectives import column_bounds
from jddist.distribution.exchange import _partners
from jddist.distribution.plan import BlockShape, Scheme, plan_exchange

NONE, DENSE = BlockShape("none"), BlockShape("dense")


def _weight(t: int, in_: int, out: int) -> BlockShape:
    return BlockShape("outer", t, in_, out)


def _bias(t: int, out: int) -> BlockShape:
    return BlockShape("outer", t, 0, out, shares_grads=True)


@pytest.mark.parametrize("world", [2, 256, 4096])
def test_a_layer_goes_as_factors_until_there_are_too_many_ranks(world: int) -> None:
    b, in_, out = 8, 1024, 512
    shapes = [[_weight(1, in_, out), _bias(1, out)]] * world
    steps = plan_exchange(shapes, [in_ * out, out], [b] * world, 1)
    # (W-1) b (in + out) against (W-1)/W b in out: factors while W (in + out) <= in out.
    if world <= in_ * out / (in_ + out):
        (step,) = steps
        assert step.scheme is Scheme.FACTORS and step.parameters == (0, 1) and step.ones
        assert step.elements_sent([b] * world) == (world - 1) * b * (in_ + out)
    else:
        assert [step.scheme for step in steps] == [Scheme.ROWS, Scheme.ROWS]
        assert steps[0].elements_sent([b] * world) == (world - 1) / world * b * in_ * out


def test_the_cheaper_scheme_is_taken_by_formula() -> None:
    for t in (1, 2, 50, 400):
        for world in (2, 3, 8):
            shapes = [[_weight(t, 20, 10)]] * world
            (step,) = plan_exchange(shapes, [200], [4] * world, 1)
            factors = (world - 1) * 4 * t * 30
            rows = (world - 1) / world * 4 * 200
            assert step.scheme is (Scheme.FACTORS if factors <= rows else Scheme.ROWS)
            assert step.elements_sent([4] * world) == min(factors, rows)


def test_one_rank_with_rows_only_turns_the_block_into_rows_for_all() -> None:
    shapes = [[_weight(1, 64, 64)], [DENSE]]
    (step,) = plan_exchange(shapes, [64 * 64], [4, 4], 1)
    assert step.scheme is Scheme.ROWS


def test_ranks_without_rows_do_not_count() -> None:
    shapes = [[_weight(2, 64, 64), _bias(2, 64)], [NONE, NONE]]
    (step,) = plan_exchange(shapes, [4096, 64], [4, 0], 1)
    assert step.scheme is Scheme.FACTORS
    assert step.lengths == (4 * 2 * 128, 0) and step.positions == (2, 0)
    (nothing,) = plan_exchange([[NONE], [NONE]], [10], [4, 4], 1)
    assert nothing.scheme is Scheme.NOTHING and nothing.elements_sent([4, 4]) == 0


def test_a_bias_is_not_fused_unless_it_shares_the_gradients_everywhere() -> None:
    apart = BlockShape("outer", 1, 0, 64)
    shapes = [[_weight(1, 64, 64), _bias(1, 64)], [_weight(1, 64, 64), apart]]
    steps = plan_exchange(shapes, [4096, 64], [4, 4], 1)
    assert [step.parameters for step in steps] == [(0,), (1,)]


@given(st.integers(0, 50), st.integers(1, 9))
def test_column_bounds_cover_everything_once(total: int, parts: int) -> None:
    bounds = column_bounds(total, parts)
    columns = [c for start, stop in bounds for c in range(start, stop)]
    assert len(bounds) == parts and columns == list(range(total))


@pytest.mark.parametrize("size", [*range(1, 10), 64, 257])
def test_every_pair_of_ranks_is_computed_once(size: int) -> None:
    pairs = [
        tuple(sorted((rank, other))) for rank in range(size) for other in _partners(rank, size)
    ]
    assert sorted(pairs) == [(a, b) for a in range(size) for b in range(a, size)]
