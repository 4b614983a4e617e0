"""A Sphinx extension: the build fails if a public name of jddist is missing from docs/api."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError

import jddist

PAGES = Path(__file__).parent / "api"
# The packages whose modules are public one by one.
_OPEN = ("jddist.integrations",)


def module_of(page: Path) -> str:
    """docs/api/linalg.md describes jddist.linalg."""
    return "jddist" if page.stem == "jddist" else f"jddist.{page.stem}"


def pages_without_module() -> list[str]:
    """The pages, as patterns, whose modules are not part of this version."""
    return [
        f"api/{page.name}" for page in sorted(PAGES.glob("*.md")) if not _exists(module_of(page))
    ]


def public_modules() -> list[str]:
    """jddist and its modules without an underscore."""
    found = ["jddist", *_inside("jddist", jddist.__path__)]
    for name in _OPEN:
        if name in found:
            found += _inside(name, importlib.import_module(name).__path__)
    return found


def public_names() -> dict[str, object]:
    """The public functions and classes of all public modules, by name."""
    found: dict[str, object] = {}
    for name in public_modules():
        module = importlib.import_module(name)
        own = [k for k, v in vars(module).items() if getattr(v, "__module__", None) == name]
        words = getattr(module, "__all__", own)
        found |= {
            f"{name}.{word}": getattr(module, word)
            for word in words
            if not word.startswith("_") and callable(getattr(module, word))
        }
    return found


def check(app: Sphinx, environment: BuildEnvironment) -> None:
    """Compares with what the pages describe; what a module passes on is described once."""
    described = {name for name, *_ in environment.domains["py"].get_objects()}
    known = {id(thing) for name, thing in public_names().items() if name in described}
    missing = [
        name
        for name, thing in public_names().items()
        if name not in described and id(thing) not in known
    ]
    if missing:
        raise ExtensionError(f"docs/api describes no {', '.join(sorted(missing))}")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True}


def _inside(package: str, path: list[str]) -> list[str]:
    names = [module.name for module in pkgutil.iter_modules(path, f"{package}.")]
    return [name for name in names if not name.rpartition(".")[2].startswith("_")]


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is not there either
        return False
