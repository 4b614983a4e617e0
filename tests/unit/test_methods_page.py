"""The tables of docs/methods.md name every method, and say the truth about those that are here."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from jddist import Stateful, aggregation, scalarization
from jddist.aggregation import Aggregator, Weighting
from jddist.scalarization import Scalarizer

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
BOTH, AGGREGATOR, WEIGHTING = "both", "aggregator", "weighting"

BASES = {
    *("Aggregator", "WeightedAggregator", "GramianWeightedAggregator"),
    *("Weighting", "RowCountWeighting", "GeneralizedWeighting", "Flattening"),
}


def _table(heading: str) -> dict[str, dict[str, str]]:
    """The first table under a heading: its rows by their first cell, the cells by column."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = re.search(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    assert lines is not None
    rows = [[c.strip() for c in line.strip("|\n").split("|")] for line in lines[0].splitlines()]
    header, _, *rows = rows
    assert all(len(row) == len(header) for row in rows)
    names = [row[0] for row in rows]
    assert len(set(names)) == len(names)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


AGGREGATORS = _table("Aggregators and weightings")
SCALARIZERS = _table("Scalarizers")
FACTORS = _table("Rescaling the learning rate when moving from a sum")


def _exported_kinds() -> dict[str, str]:
    names = set(aggregation.__all__) - BASES
    methods = {name.removesuffix("Weighting") for name in names}
    weightings = {name for name in methods if f"{name}Weighting" in names}
    return {
        name: (BOTH if name in names else WEIGHTING) if name in weightings else AGGREGATOR
        for name in methods
    }


def test_the_tables_name_every_method() -> None:
    assert {name: row["Kind"] for name, row in AGGREGATORS.items()} == _exported_kinds()
    assert set(FACTORS) == set(AGGREGATORS)
    assert set(SCALARIZERS) == set(scalarization.__all__) - {"Scalarizer"}


def _class(module: ModuleType, name: str) -> type[Any]:
    found = getattr(module, name, None) or getattr(module, f"{name}Weighting")
    assert isinstance(found, type) and issubclass(found, Aggregator | Weighting | Scalarizer)
    return found


@pytest.mark.parametrize("name", sorted(_exported_kinds()))
def test_stateful_aggregators(name: str) -> None:
    if name != "CRMOGM":  # It also has the state of what it wraps.
        stated = AGGREGATORS[name]["State"] != "–"
        assert issubclass(_class(aggregation, name), Stateful) == stated


@pytest.mark.parametrize("name", SCALARIZERS)
def test_stateful_scalarizers(name: str) -> None:
    stated = SCALARIZERS[name]["State"] != "–"
    assert issubclass(_class(scalarization, name), Stateful) == stated


ARGUMENTS: dict[str, dict[str, Any]] = {
    "CAGrad": {"c": 0.4},
    "Krum": {"n_byzantine": 1},
    "TrimmedMean": {"trim_number": 1},
}
M = 5


@pytest.mark.parametrize("name", sorted(_exported_kinds()))
def test_random_aggregators(name: str) -> None:
    cls = _class(aggregation, name)
    needed = [
        p
        for p in inspect.signature(cls).parameters.values()
        if p.default is p.empty and p.name not in ARGUMENTS.get(name, {})
    ]
    if needed or hasattr(cls, "set_losses"):
        pytest.skip("needs more than a matrix")
    before = torch.get_rng_state()
    cls(**ARGUMENTS.get(name, {}))(torch.randn(M, M, generator=torch.Generator().manual_seed(0)))
    drew = not torch.equal(torch.get_rng_state(), before)
    assert drew == (AGGREGATORS[name]["Random"] == "yes")


FACTOR_VALUES = {
    "1": 1.0,
    "2": 2.0,
    "m": M,
    "m²": M**2,
    "√m": M**0.5,
    "m / (1 + c)": M / 1.4,
}


@pytest.mark.parametrize("name", sorted(_exported_kinds()))
def test_factors_where_all_rows_agree(name: str) -> None:
    factor = FACTOR_VALUES.get(FACTORS[name]["Factor"])
    cls = _class(aggregation, name)
    if factor is None or not issubclass(cls, Aggregator) or hasattr(cls, "set_losses"):
        pytest.skip("no fixed factor, or needs more than a matrix")
    row = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    aggregator = cls(**ARGUMENTS.get(name, {}))
    for _ in range(60):  # What tracks gradients has found them by then.
        update = aggregator(row.expand(M, 3))
        if not issubclass(cls, Stateful):
            break
    # Solvers of cone programs end at about 1e-6.
    assert_close(factor * update, M * row, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCALARIZERS)
def test_factors_of_scalarizers_at_equal_losses(name: str) -> None:
    if name == "Constant":
        assert SCALARIZERS[name]["Factor"] == "1 / w"
        return
    uniform = torch.full((M,), 1 / M, dtype=torch.float64)
    arguments: dict[str, dict[str, Any]] = {
        "IMTLL": {"shape": M},
        "UW": {"shape": M},
        "FAMO": {"shape": M},
        "STCH": {"mu": 0.1},
        "COSMOS": {"lambda_": 2.0, "weights": uniform},
        "PBI": {"theta": 3.0, "weights": uniform},
    }
    scalarizer = getattr(scalarization, name)(**arguments.get(name, {}))
    losses = torch.full((M,), 0.7, dtype=torch.float64, requires_grad=True)
    (weights,) = torch.autograd.grad(scalarizer(losses), losses)
    factor = FACTOR_VALUES[SCALARIZERS[name]["Factor"]]
    # float32 parameters; FAMO's 1e-8 and PBI's 1e-12 change less.
    assert float(weights.sum()) * factor == pytest.approx(M, rel=1e-5)
