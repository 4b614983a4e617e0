"""``Engine.explain``: what the last step did with each layer, from shapes written out here."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from jddist.autogram import Engine
from jddist.autogram.explanation import LayerReport, Taken, as_text, reports
from jddist.autogram.parameters import build_table, scope_of
from jddist.distribution import BlockShape, plan
from jddist.distribution.planning import plan_sums
from tests.unit.autogram._common import Offset, data, losses_of, small_model

TILE = 1 << 22


class Pooled(nn.Module):
    """Embedding, norm, a layer at each of the positions, mean, a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.norm = nn.LayerNorm(4)
        self.wide = nn.Linear(4, 3)
        self.last = nn.Linear(3, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.wide(self.norm(self.table(x))).mean(1))
        return out


def _reports(engine: Engine) -> dict[str, LayerReport]:
    assert engine._taken is not None
    return {r.name: r for r in reports(engine.table, engine._taken)}


def test_before_any_step_it_says_so() -> None:
    text = Engine(small_model(), batch_dim=0).explain()
    assert text.startswith("No step was taken yet") and "\n" not in text


def test_one_row_per_layer_with_its_rule_and_form() -> None:
    model = Pooled()
    engine = Engine(model, batch_dim=0)
    tokens = torch.arange(4 * 30).view(4, 30) % 11
    engine.compute_gramian(model(tokens).square().sum(1))
    found = _reports(engine)
    assert [(r.name, r.type, r.rule, r.form) for r in found.values()] == [
        ("table", "Embedding", "embedding", "lookup"),
        ("norm", "LayerNorm", "layer_norm", "rows"),
        # 30 positions and a matrix of 12: its rows are small.
        ("wide", "Linear", "linear", "materialised"),
        ("last", "Linear", "linear", "pairwise"),
    ]
    assert all(r.flops > 0 and r.memory > 0 for r in found.values())
    # In one process nothing is sent.
    assert all(r.bytes_sent == 0 and r.exchange == "" for r in found.values())
    lines = engine.explain().splitlines()
    assert "one process" in lines[0] and lines[1].split()[:5] == [
        "layer",
        "type",
        "rule",
        "form",
        "exchange",
    ]
    assert [line.split()[0] for line in lines[2:]] == ["table", "norm", "wide", "last", "all"]


def test_the_generic_and_the_direct_way_are_named() -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    engine.compute_gramian(losses_of(model(data())))
    assert _reports(engine)["2"].rule == _reports(engine)["2"].form == "fallback"
    # Without a batch dimension a module without a rule takes a backward pass per objective.
    engine = Engine(model, batch_dim=None)
    engine.compute_gramian(losses_of(model(data())))
    assert {name: r.form for name, r in _reports(engine).items()} == {
        "0": "materialised",
        "2": "direct",
        "3": "materialised",
    }


def test_it_speaks_of_the_last_step() -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    memory = []
    for size in (4, 8):
        engine.backward(losses_of(model(data(size))), lambda gramian: gramian.diagonal())
        memory.append(_reports(engine)["0"].memory)
    # Factors, two products for each pair of samples, and the bias: its rows are its gradients.
    assert memory == [8 * (b * 11 + b * b * 2 + b * 5) for b in (4, 8)]


def test_a_layer_that_is_not_reached_has_no_rows() -> None:
    model = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)]).double()
    engine = Engine(model, batch_dim=0)
    engine.compute_gramian(losses_of(model[0](data())))
    found = _reports(engine)
    assert found["1"].form == "none" and found["1"].flops == found["1"].memory == 0


def test_a_tied_parameter_counts_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)).double()
    model[1].weight = model[0].weight
    engine = Engine(model, batch_dim=0)
    engine.compute_gramian(losses_of(model(data())))
    first, second = _reports(engine).values()
    assert first.flops > 0 and second.flops == second.memory == 0
    assert first.form == second.form


@pytest.mark.parametrize("rank", [0, 2])
def test_bytes_and_scheme_of_a_rank(rank: int) -> None:
    """A pure function of shapes: no process group, and the plan of 64 ranks."""
    model = nn.Sequential(nn.Linear(1024, 512), Offset(512), Offset(256))
    shapes = (
        BlockShape("outer", 1, 1024, 512),
        BlockShape("outer", 1, 0, 512, shares_grads=True),
        BlockShape("dense"),
        BlockShape("dense"),
    )
    table = build_table(scope_of([model], recursive=True))
    exchange = plan([shapes] * 64, [1024 * 512, 512, 512, 256], [2] * 64)
    taken = Taken(shapes, 2, 1, frozenset(), rank, exchange, 4, TILE)
    linear, offset, other = reports(table, taken)
    pairs = 128 * 129 // 2
    assert linear.exchange == "features" and linear.form == "pairwise"
    assert linear.bytes_sent == 4 * (2 * (1536 - 24) + 63 * pairs // 64 * 2)
    assert offset.exchange == "rows" and offset.form == "fallback"
    # Both travel in one message, of which each counts with its columns.
    assert offset.bytes_sent == 2 * other.bytes_sent == 4 * 2 * (768 - 12) * 2 / 3
    text = as_text([linear, offset, other], taken)
    assert f"rank {rank} of 64" in text and "features" in text and "Gramian" in text
    total = linear.bytes_sent + 1.5 * offset.bytes_sent + exchange.gramian_bytes
    assert total == float(exchange.bytes_sent[rank])
    assert f"{total:.3g}" in text.splitlines()[-1]


def test_estimates_of_the_same_rows() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    shapes = (BlockShape("outer", 5, 6, 4), BlockShape("outer", 5, 0, 4, shares_grads=True))
    table = build_table(scope_of([model], recursive=True))
    exchange = plan_sums([0, 1], [24, 4], 3, 2)
    (linear,) = reports(table, Taken(shapes, 1, 3, frozenset(), 1, exchange, 4, TILE))
    assert linear.exchange == "sums" and linear.form == "materialised"
    assert linear.bytes_sent == 4 * 3 * 14  # half of 3 rows of 28 columns
    taken = Taken(shapes, 1, 3, frozenset({0}), 1, exchange, 4, TILE)
    assert reports(table, replace(taken, direct=frozenset({0, 1})))[0].form == "direct"


def test_nothing_is_remembered_of_the_step_but_shapes() -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.compute_gramian(losses_of(model(data())))
    assert engine._taken is not None
    assert not any(isinstance(value, Tensor) for value in vars(engine._taken).values())


def test_an_unknown_preference_is_refused() -> None:
    with pytest.raises(ValueError, match="prefer='speed'; expected 'bytes' or 'time'"):
        Engine(small_model(), batch_dim=0, prefer="speed")  # type: ignore[arg-type]
