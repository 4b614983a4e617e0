"""A Sphinx extension: docstrings are plain text with ``code`` in it, formulas included.

What reStructuredText would read as markup in a formula, such as |g|, lambda_ or [m, *shape], is
taken as it stands.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

# Code, of which nothing is changed.
_CODE = re.compile(r"(``.+?``|:\w+:`.+?`|`.+?`)")
# A bar; a star before a word; an underscore after one.
_MARKUP = re.compile(r"\||(?<![\w*])\*(?=\w)|(?<=\w)_(?!\w)")
_ARGUMENT = re.compile(r"\s*\*{1,2}\w+( \(.*\))?:")


def escape(line: str) -> str:
    """The line with a backslash before all that is no markup."""
    if _ARGUMENT.match(line):
        return line  # napoleon knows what it is
    parts = _CODE.split(line)
    parts[::2] = [_MARKUP.sub(lambda m: "\\" + m[0], part) for part in parts[::2]]
    return "".join(parts)


def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list) -> None:
    """Called for every docstring."""
    lines[:] = [escape(line) for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx; before napoleon, which adds markup of its own."""
    app.connect("autodoc-process-docstring", process, priority=100)
    return {"parallel_read_safe": True}
