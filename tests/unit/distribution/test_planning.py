"""Planning is pure: no process group, any number of ranks. Expected numbers stand written out."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jddist.distribution import BlockShape, Plan, Scheme, plan
from jddist.distribution.collectives import column_bounds
from jddist.distribution.planning import plan_sums
from jddist.distribution.schemes import partners_of, receivers_of, shard_widths
from tests.benchmark.models import MODELS
from tests.benchmark.planning import row, shapes_of

NONE, DENSE = BlockShape("none"), BlockShape("dense")


def _weight(t: int, in_: int, out: int) -> BlockShape:
    return BlockShape("outer", t, in_, out)


def _bias(t: int, out: int) -> BlockShape:
    return BlockShape("outer", t, 0, out, shares_grads=True)


def _best_of_section_6(world: int, b: int, t: int, k: int, in_: int, out: int) -> float:
    """Numbers sent per rank by the best of the schemes, as formulas; the ring of half of them."""
    gather = (world - 1) * b * t * (in_ + k * out) / 2
    rows = (world - 1) / world * k * b * in_ * out
    if t > 1:
        return min(gather, rows)
    grams = 2 * (world * b) ** 2 if k == 1 else (world * b) ** 2 * (1 + k * k)
    return min(gather, rows, (world - 1) / world * (b * (in_ + k * out) + grams))


@pytest.mark.parametrize("world", [2, 3, 8, 64, 1024, 4096])
@pytest.mark.parametrize("t", [1, 2, 64])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("in_", "out"), [(3, 2), (64, 32), (1024, 512), (50, 10000)])
def test_no_layer_sends_more_than_the_best_scheme(
    world: int, t: int, k: int, in_: int, out: int
) -> None:
    for b in (1, 4, 64):
        found = plan([[_weight(t, in_, out)]] * world, [in_ * out], [b] * world, k)
        (step,) = found.steps
        assert float(step.elements.mean()) <= _best_of_section_6(world, b, t, k, in_, out) + 1e-6


def test_each_scheme_is_taken_where_it_sends_least() -> None:
    cases = {
        # 4 samples on each of 2 ranks: factors 4 * 1536 / 2, features the same and the Grams.
        Scheme.FACTORS: (2, 4, 1, 1024, 512),
        # 2 samples on each of 64: factors 31.5 * 2 * 1536, features 2 * 1536 and 128 * 129.
        Scheme.FEATURES: (64, 2, 1, 1024, 512),
        # 100 positions: the rows are smaller than the factors.
        Scheme.ROWS: (2, 4, 100, 10, 10),
    }
    for scheme, (world, b, t, in_, out) in cases.items():
        shapes = [[_weight(t, in_, out), _bias(t, out)]] * world
        found = plan(shapes, [in_ * out, out], [b] * world)
        assert {step.scheme for step in found.steps} == {scheme}
        if scheme is not Scheme.ROWS:
            assert [step.parameters for step in found.steps] == [(0, 1)]
            assert found.steps[0].ones
        elif scheme is Scheme.ROWS:
            assert [step.parameters for step in found.steps] == [(0, 1)]


@pytest.mark.parametrize("batches", [[4, 4], [4, 1, 7], [0, 3], [2, 0, 3, 5], [5, 0, 0, 1, 9]])
def test_numbers_sent_by_every_rank(batches: list[int]) -> None:
    world, in_, out = len(batches), 30, 20
    ranks = range(world)
    for t, batch_factor in ((1, 1), (100, 1), (1, 40)):
        sizes = [batch_factor * b for b in batches]
        for k in (1, 3):
            shapes = [[_weight(t, in_, out) if b else NONE] for b in sizes]
            (step,) = plan(shapes, [in_ * out], sizes, k).steps
            if step.scheme is Scheme.FACTORS:
                expected = [
                    len(receivers_of(r, world, step.turn)) * sizes[r] * t * (in_ + k * out)
                    for r in ranks
                ]
            elif step.scheme is Scheme.ROWS:
                width = -(-in_ * out // world)
                mine = [min(in_ * out, (r + 1) * width) - min(in_ * out, r * width) for r in ranks]
                expected = [sizes[r] * k * (in_ * out - mine[r]) for r in ranks]
            else:
                pairs = sum(sizes) * (sum(sizes) + 1) // 2
                grams = (world - 1) * -(-pairs // world) * (1 + k * k)
                shares = [
                    (b - a) + k * (q - p)
                    for (a, b), (p, q) in zip(
                        column_bounds(in_, world), column_bounds(out, world), strict=True
                    )
                ]
                expected = [sizes[r] * (in_ + k * out - shares[r]) + grams for r in ranks]
            assert step.elements.tolist() == expected


def test_time_weighs_operations_too() -> None:
    # A transformer's layer on 2 ranks: the factors are fewer numbers, but then both form all rows.
    in_, out, t = 192, 576, 64
    shapes, columns, batches = [[_weight(t, in_, out)]] * 2, [in_ * out], [32] * 2
    fewest = plan(shapes, columns, batches)
    quickest = plan(shapes, columns, batches, prefer="time", flops_per_byte=10)
    assert [step.scheme for step in fewest.steps] == [Scheme.FACTORS]
    assert [step.scheme for step in quickest.steps] == [Scheme.ROWS]
    assert float(quickest.flops.max()) < float(fewest.flops.max())
    assert float(quickest.bytes_sent.max()) > float(fewest.bytes_sent.max())
    # Where sending is slow beyond measure, both are the same.
    slow = plan(shapes, columns, batches, prefer="time", flops_per_byte=1e9)
    assert [step.scheme for step in slow.steps] == [Scheme.FACTORS]
    for text in (str(fewest), str(quickest)):
        assert "bytes sent" in text and "FLOPs" in text


def test_operations_of_each_scheme() -> None:
    """The planned operations grow as the schemes' own arithmetic does."""
    in_, out, t, b = 64, 64, 16, 16
    forming, product = 2 * b * t * in_ * out, 2 * b * b * in_ * out
    for world in (2, 8):
        shapes = [[_weight(t, in_, out)]] * world
        factors = plan(shapes, [in_ * out], [b] * world, prefer="time", flops_per_byte=1e9)
        rows = plan(shapes, [in_ * out], [b] * world, prefer="time", flops_per_byte=1e-9)
        assert rows.steps[0].scheme is Scheme.ROWS
        share = rows.flops.max() - forming  # W b rows of a W-th of the columns
        assert 0.5 * world * product <= share <= 2 * world * product
        if world == 2:
            assert factors.steps[0].scheme is Scheme.FACTORS
            # The other's rows are formed too.
            assert 2 * forming <= float(factors.flops.max()) <= 2 * forming + 4 * product


def test_the_work_of_opposite_ranks_takes_turns() -> None:
    shapes = [[_weight(1, 64, 64)] * 4] * 2
    found = plan(shapes, [4096] * 4, [4, 4])
    assert [step.turn for step in found.steps] == [0, 1, 0, 1]
    assert float(found.bytes_sent[0]) == float(found.bytes_sent[1])


@pytest.mark.parametrize("kind", ["even", "uneven", "empty"])
def test_four_thousand_ranks_are_planned_in_no_time(kind: str) -> None:
    world = 4096
    batches = {
        "even": [8] * world,
        "uneven": [1 + r % 7 for r in range(world)],
        "empty": [8] * (world - 1) + [0],
    }[kind]
    layers = 12
    one = [shape for _ in range(layers) for shape in (_weight(1, 512, 512), _bias(1, 512))]
    none = [NONE] * (2 * layers)
    shapes = [one if b else none for b in batches]
    start = time.process_time()
    found = plan(shapes, [512 * 512, 512] * layers, batches)
    # Not a measurement: a plan that looks at each pair of ranks would take minutes.
    assert time.process_time() - start < 5
    assert len(found.bytes_sent) == world
    if kind == "empty":
        assert found.bytes_sent[-1] < found.bytes_sent[0]


def test_one_rank_with_rows_only_turns_the_block_into_rows_for_all() -> None:
    shapes = [[_weight(1, 64, 64)], [DENSE]]
    (step,) = plan(shapes, [64 * 64], [4, 4]).steps
    assert step.scheme is Scheme.ROWS


def test_ranks_without_rows_do_not_count() -> None:
    shapes = [[_weight(2, 64, 64), _bias(2, 64)], [NONE, NONE]]
    (step,) = plan(shapes, [4096, 64], [4, 0]).steps
    assert step.scheme is Scheme.FACTORS and step.lengths is not None
    assert step.lengths.tolist() == [4 * 2 * 128, 0]
    (nothing,) = plan([[NONE], [NONE]], [10], [4, 4]).steps
    assert nothing.scheme is Scheme.NOTHING and nothing.elements.tolist() == [0, 0]


def test_a_bias_is_not_fused_unless_it_shares_the_gradients_everywhere() -> None:
    apart = BlockShape("outer", 1, 0, 64)
    shapes = [[_weight(1, 64, 64), _bias(1, 64)], [_weight(1, 64, 64), apart]]
    steps = plan(shapes, [4096, 64], [4, 4]).steps
    assert [step.parameters for step in steps] == [(0,), (1,)]


def test_small_parameters_share_a_message() -> None:
    found = plan([[DENSE] * 5] * 2, [10, 10, 10, 3 << 20, 3 << 20], [1, 1])
    assert [step.parameters for step in found.steps] == [(0, 1, 2), (3,), (4,)]
    sums = plan_sums([0, 2, 3], [10, 99, 10, 3 << 20], 2, 2)
    assert [step.parameters for step in sums.steps] == [(0, 2), (3,)]


def test_one_process_sends_nothing() -> None:
    found = plan([[_weight(1, 64, 32), _bias(1, 32), DENSE]], [2048, 32, 5], [16])
    assert found.bytes_sent.tolist() == [0] and float(found.flops) > 0


def test_the_gramian_is_sent_once_and_half_of_it() -> None:
    found: Plan = plan([[DENSE]] * 4, [8], [3] * 4, itemsize=8)
    numbers = 12 * 13 // 2 + 12  # its lower triangle, and a flag for each objective
    assert found.gramian_bytes == 2 * 3 / 4 * numbers * 8
    assert found.bytes_sent.tolist() == [3 * 6 * 8 + found.gramian_bytes] * 4


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="prefer='speed'"):
        plan([[DENSE]], [1], [1], prefer="speed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shapes of 1 ranks and batches of 2"):
        plan([[DENSE]], [1], [1, 1])
    with pytest.raises(ValueError, match="1 shapes per rank and 2 numbers of columns"):
        plan([[DENSE]], [1, 1], [1])
    with pytest.raises(ValueError, match="-1 samples"):
        plan([[DENSE]], [1], [-1])


@given(st.integers(0, 50), st.integers(1, 9))
def test_column_bounds_cover_everything_once(total: int, parts: int) -> None:
    bounds = column_bounds(total, parts)
    columns = [c for start, stop in bounds for c in range(start, stop)]
    assert len(bounds) == parts and columns == list(range(total))
    assert shard_widths(total, parts).tolist() == [stop - start for start, stop in bounds]


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("size", [*range(1, 10), 64, 257])
def test_every_pair_of_ranks_is_computed_once(size: int, turn: int) -> None:
    ranks = range(size)
    pairs = [tuple(sorted((r, other))) for r in ranks for other in partners_of(r, size, turn)]
    assert sorted(pairs) == [(a, b) for a in ranks for b in range(a + 1, size)]
    needed = [(r, other) for r in ranks for other in partners_of(r, size, turn)]
    assert sorted(needed) == sorted((r, s) for s in ranks for r in receivers_of(s, size, turn))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(0, 1))
def test_sums_over_partners(values: list[int], turn: int) -> None:
    from jddist.distribution.schemes import _over_partners

    size = len(values)
    expected = [sum(values[s] for s in partners_of(r, size, turn)) for r in range(size)]
    found = _over_partners(torch.tensor(values, dtype=torch.float64), turn)
    assert found.tolist() == expected


def test_the_table_of_the_models() -> None:
    """The benchmark's rows come from the models' own layers: here 784-1024-1024-10 at b = 256."""
    shapes, columns = shapes_of(MODELS["mlp256"])
    assert [(s.kind, s.positions, s.in_features, s.out_features) for s in shapes[::2]] == [
        ("outer", 1, 784, 1024),
        ("outer", 1, 1024, 1024),
        ("outer", 1, 1024, 10),
    ]
    assert columns == [784 * 1024, 1024, 1024**2, 1024, 10240, 10]
    # Two ranks send each other half of their factors on average; the larger layers take turns.
    layers = sorted([784 + 1024, 2 * 1024, 1024 + 10])
    sent = 256 * max(layers[0] + layers[1], layers[2]) * 4
    assert f"{sent / 2**20:.1f} MiB" in row(MODELS["mlp256"], 2, "bytes")
