"""The support matrix: in the README as it is here, and each "yes" shown by a test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support import BEGIN, END, FEATURES, ROWS, table

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "node", sorted({cell for row in ROWS for cell in row.cells if "::" in cell})
)
def test_every_yes_names_a_test(node: str) -> None:
    file, function = node.split("::")
    tree = ast.parse((TESTS / file).read_text())
    assert function in {item.name for item in tree.body if isinstance(item, ast.FunctionDef)}


def test_the_matrix_is_complete() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    assert all(len(row.cells) == len(FEATURES) and all(row.cells) for row in ROWS)


def test_the_readme_has_the_matrix() -> None:
    readme = (TESTS.parent / "README.md").read_text()
    if BEGIN not in readme:
        pytest.skip("the README has no support matrix yet: python -m tests.support prints it")
    assert readme.split(BEGIN)[1].split(END)[0].strip() == table()
