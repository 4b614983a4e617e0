"""The layers of the package: the mathematics never sees ranks, and one place alone sends."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "jddist"
PURE = ("aggregation", "linalg", "scalarization", "autogram/rules", "autogram/blocks")


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(part: str) -> list[Path]:
    path = PACKAGE / part
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("part", PURE)
def test_mathematics_does_not_import_distribution(part: str) -> None:
    files = _files(part)
    assert files
    for file in files:
        for name in _imports(file):
            assert not name.startswith(("torch.distributed", "jddist.distribution")), file


def test_collectives_are_called_in_one_module_only() -> None:
    """Elsewhere, torch.distributed serves for asking who and how many, and for placements."""
    sending = ("all_reduce", "all_gather", "broadcast", "reduce_scatter", "all_to_all", "barrier")
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.name == "collectives.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert not (node.value.id == "dist" and node.attr.startswith(sending)), file
