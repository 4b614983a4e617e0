"""Text that ships with Python, as sequences of characters: the docstrings of its library."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

MODULES = (
    "argparse", "bisect", "calendar", "collections/__init__", "concurrent/futures/_base",
    "contextlib", "copy", "csv", "datetime", "decimal", "_pydecimal", "difflib", "doctest",
    "email/message", "enum", "fractions", "functools", "heapq", "http/client", "inspect",
    "ipaddress", "json/__init__", "logging/__init__", "mailbox", "optparse", "pathlib", "pickle",
    "platform", "pprint", "random", "shutil", "smtplib", "socket", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "turtle", "typing",
    "unittest/case", "urllib/parse", "urllib/request", "zipfile",
)  # fmt: skip
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))


def load_sequences(length: int) -> tuple[Tensor, Tensor]:
    """Sequences [n, length + 1] of indices into ``CHARACTERS``, for training and for validation.

    Every tenth docstring is for validation alone.
    """
    texts = [text for text in _docstrings() if len(text) > 40]
    training = "\n\n".join(text for i, text in enumerate(texts) if i % 10)
    validation = "\n\n".join(text for i, text in enumerate(texts) if i % 10 == 0)
    return _cut(training, length + 1), _cut(validation, length + 1)


def _docstrings() -> list[str]:
    """The docstrings of the modules' source files, without importing them."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for name in MODULES:
        path = library / f"{name}.py"
        if not path.exists():  # some modules become packages in later versions
            path = library / name / "__init__.py"
        if not path.exists():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found[ast.get_docstring(node) or ""] = None
    return list(found)


def _cut(text: str, length: int) -> Tensor:
    index = {character: i for i, character in enumerate(CHARACTERS)}
    tokens = torch.tensor([index[c] for c in text if c in index])
    return tokens[: len(tokens) // length * length].view(-1, length)
