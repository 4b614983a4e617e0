"""The planning tables of docs/scaling.md are what the planner says.

``python -m tests.unit.test_scaling_page`` writes them anew.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from jddist.distribution import BlockShape, plan
from jddist.distribution.planning import Prefer
from tests.benchmark.models import MODELS
from tests.benchmark.planning import shapes_of

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
TITLES = {
    "mlp256": "MLP, batch 256",
    "cnn": "CNN, batch 64",
    "transformer192": "transformer, batch 32 × 64 positions",
}
LINE = re.compile(r"^\| (?:MLP|CNN|transformer), .*$", flags=re.MULTILINE)
TABLES: dict[Prefer, tuple[int, ...]] = {"bytes": (2, 8, 64, 1024), "time": (64, 1024)}


@cache
def _shapes(model: str) -> tuple[list[BlockShape], list[int]]:
    return shapes_of(MODELS[model])


def _number(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def line(model: str, ranks: int, prefer: Prefer) -> str:
    """One line of the tables: megabytes (10⁶) and GFLOP of the busiest rank."""
    shapes, columns = _shapes(model)
    found = plan([shapes] * ranks, columns, [MODELS[model].batch] * ranks, prefer=prefer)
    layers = float(found.bytes_sent.max()) - found.gramian_bytes
    schemes: Counter[str] = Counter()
    for step in found.steps:
        schemes[step.scheme.value] += len(step.parameters)
    cells = [
        TITLES[model],
        f"{ranks:,}",
        f"{MODELS[model].batch * ranks:,}",
        _number(layers / 1e6),
        _number(found.gramian_bytes / 1e6),
        _number(float(found.flops.max()) / 1e9),
        ", ".join(f"{n} {scheme}" for scheme, n in sorted(schemes.items())),
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("model", TITLES)
def test_the_tables(model: str) -> None:
    text = PAGE.read_text()
    for prefer, counts in TABLES.items():
        for ranks in counts:
            assert line(model, ranks, prefer) in text


def test_no_other_lines() -> None:
    found = LINE.findall(PAGE.read_text())
    assert len(found) == len(TITLES) * sum(map(len, TABLES.values()))


def rewrite() -> None:
    """Puts the lines into the page, in the places of those that are there."""
    new = [line(m, w, prefer) for prefer, counts in TABLES.items() for m in TITLES for w in counts]
    lines = iter(new)
    PAGE.write_text(LINE.sub(lambda _: next(lines), PAGE.read_text()))


if __name__ == "__main__":
    rewrite()
