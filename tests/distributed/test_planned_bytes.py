"""The bytes on the wire are those of formulas written out here, and of the plan.

None of the formulas is the planner's own code. Which layer takes which scheme is written out too.
"""

from __future__ import annotations

from typing import Any

import pytest

from jddist.autogram import Engine
from tests._ranks import run_ranks
from tests.distributed._exchanged import inputs, make
from tests.distributed._spy import spying
from tests.distributed._training import wrap

FLOAT = 8  # bytes of a float64
EACH = 3  # samples on each rank
LENGTH, WIDTH = 4, 8  # of the transformer's sentences and vectors

# (scheme, positions, width of the inputs, width of the outputs), or (scheme, columns together).
# "lower" and "upper": which half of an even number of ranks sends to its opposite.
EXPECTED: dict[tuple[str, int], list[tuple[Any, ...]]] = {
    ("mlp", 2): [("upper", 1, 16, 24), ("lower", 1, 24, 24), ("upper", 1, 24, 10)],
    ("mlp", 4): [("upper", 1, 16, 24), ("lower", 1, 24, 24), ("upper", 1, 24, 10)],
    ("cnn", 2): [
        ("upper", 4, 9 * 4, 8),
        ("lower", 1, 32, 128),
        ("lower", 1, 128, 10),
        ("rows", 27 * 2 + 2 + 18 * 4 + 4),
    ],
    ("cnn", 4): [
        ("features", 32, 128),
        ("features", 128, 10),
        ("rows", 27 * 2 + 2 + 18 * 4 + 4 + 36 * 8 + 8),
    ],
    ("transformer", 2): [
        ("lookup", "upper"),
        ("lower", LENGTH, WIDTH, 3 * WIDTH),
        ("upper", LENGTH, WIDTH, WIDTH),
        ("upper", LENGTH, WIDTH, 4 * WIDTH),
        ("lower", LENGTH, 4 * WIDTH, WIDTH),
        ("upper", 1, WIDTH, 10),
        ("rows", 3 * 2 * WIDTH),  # the norms
    ],
    ("transformer", 4): [
        ("lookup", "upper"),
        ("lower", 1, WIDTH, 10),
        # The norms, and the linear layers of the block with their biases.
        ("rows", 6 * WIDTH + 12 * WIDTH**2 + (3 + 1 + 4 + 1) * WIDTH),
    ],
}


def _on_ranks(rank: int, world_size: int, name: str) -> dict[str, Any]:
    engine = Engine(ddp := wrap(make(name)), batch_dim=0, prefer="bytes")
    x = inputs(name, EACH * world_size).split(EACH)[rank]
    losses = ddp(x).square().sum(1)
    with spying(rank, world_size) as log:
        engine.compute_gramian(losses)
    assert engine._taken is not None and engine._taken.plan is not None
    plan = engine._taken.plan
    return {
        "log": [list(entry) for entry in log],
        "plan": [float(step.elements[rank]) * plan.itemsize for step in plan.steps],
        "total": float(plan.bytes_sent[rank]),
        "explained": engine.explain(),
    }


def _share(total: int, rank: int, world_size: int) -> int:
    """How many of ``total`` columns a rank has: full shards first."""
    width = -(-total // world_size)
    return min(total, (rank + 1) * width) - min(total, rank * width)


def _copies(half: str, rank: int, world_size: int) -> int:
    """To how many ranks a rank sends its factors: half of the others, more or less."""
    others = world_size - 1
    is_upper = rank >= world_size // 2
    return others // 2 + int(is_upper == (half == "upper"))


def _messages(name: str, rank: int, world_size: int) -> list[tuple[str, float]]:
    others, samples = world_size - 1, EACH * world_size
    pairs = samples * (samples + 1) // 2
    messages: list[tuple[str, float]] = []
    for scheme, *sizes in EXPECTED[name, world_size]:
        if scheme == "rows":
            (columns,) = sizes
            sent = EACH * (columns - _share(columns, rank, world_size))
            messages.append(("all_to_all_single", sent * FLOAT))
        elif scheme == "features":
            kept = sum(_share(n, rank, world_size) for n in sizes)
            messages.append(("all_to_all_single", EACH * (sum(sizes) - kept) * FLOAT))
            messages.append(("reduce_scatter", others * -(-pairs // world_size) * 2 * FLOAT))
        elif scheme == "lookup":
            tokens = inputs(name, samples).split(EACH)[rank]
            entries = sum(len(set(sentence.tolist())) for sentence in tokens)
            sent = _copies(sizes[0], rank, world_size) * entries * (2 + WIDTH)
            messages.append(("all_to_all_single", sent * FLOAT))
        else:
            positions, in_, out = sizes
            sent = _copies(scheme, rank, world_size) * EACH * positions * (in_ + out)
            messages.append(("all_to_all_single", sent * FLOAT))
    half_and_flags = pairs + samples
    messages.append(("all_reduce", 2 * others / world_size * half_and_flags * FLOAT))
    return messages


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_bytes_sent(name: str, world_size: int) -> None:
    for rank, found in enumerate(run_ranks(_on_ranks, world_size, name)):
        expected = _messages(name, rank, world_size)
        # The next layer's message is sent before a reduce-scatter: only within a kind do they keep
        # the order. The handshake comes first.
        log = [(operation, sent) for operation, sent in found["log"][2:]]
        for operation in ("all_to_all_single", "reduce_scatter", "all_reduce", "all_gather"):
            assert [s for o, s in log if o == operation] == [
                s for o, s in expected if o == operation
            ], operation
        assert len(log) == len(expected)
        assert found["total"] == sum(sent for _, sent in expected) == sum(s for _, s in log)
        assert len(found["plan"]) == len(EXPECTED[name, world_size])
        assert f"rank {rank} of {world_size}" in found["explained"]


def test_the_least_is_taken() -> None:
    """Of the three schemes the one that sends the fewest numbers over all ranks, by formulas."""
    for (name, world_size), layers in EXPECTED.items():
        samples = EACH * world_size
        for scheme, *sizes in layers:
            if scheme in ("rows", "lookup"):
                continue
            positions, in_, out = sizes if len(sizes) == 3 else (1, *sizes)
            others = world_size - 1
            sends = {
                "factors": others / 2 * EACH * positions * (in_ + out),
                "rows": others / world_size * EACH * (in_ + 1) * out,
            }
            if positions == 1:
                pairs = -(-samples * (samples + 1) // 2 // world_size)
                grams = others * 2 * pairs
                sends["features"] = others / world_size * EACH * (in_ + out) + grams
            taken = "features" if scheme == "features" else "factors"
            assert sends[taken] == min(sends.values()), (name, world_size, scheme, sizes)
