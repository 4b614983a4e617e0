"""Sphinx configuration: python -m sphinx -W docs build/docs (offline; warnings are errors)."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from _public_names import pages_without_module  # noqa: E402

from jddist import __version__  # noqa: E402

project = "jddist"
author = copyright = "The jddist authors"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "_plain_docstrings",
    "_public_names",
]
exclude_patterns = ["_build", *pages_without_module()]
default_role = "code"  # `name` in docstrings
html_theme = "furo"
html_title = "jddist"
html_copy_source = False

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "groupwise"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
