"""Reads one checkpoint, after a look at all of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from jddist.errors import CheckpointError

from . import _random, _storage
from ._directory import Directory
from ._ranks import Ranks
from ._state import RunState
from ._structure import from_bytes
from ._writing import STRUCTURE, random_file


def checked_manifest(ranks: Ranks, directory: Directory, name: str) -> dict[str, Any]:
    """The manifest of a checkpoint, all of whose files are intact.

    Raises:
        CheckpointError: Something is missing or damaged. The same on every rank.
    """
    what = f"Reading the checkpoint {name} in {directory.path}"
    manifest: dict[str, Any] = ranks.run_on_first(what, lambda: directory.manifest(name))
    files = sorted(manifest["files"].items())
    mine = dict(files[ranks.rank :: ranks.size])  # each rank checks some
    ranks.run(what, lambda: directory.check(name, mine))
    return manifest


def read_checkpoint(ranks: Ranks, state: RunState, path: Path, manifest: dict[str, Any]) -> None:
    """Gives the state of an intact checkpoint to a run.

    Raises:
        CheckpointError: It is one of another model; nothing was changed then. The same everywhere.
    """
    what = f"Loading the checkpoint {path.name} in {path.parent}"
    tensors: dict[str, Tensor] = {}
    structures: list[list[Any]] = []

    def prepare() -> None:
        structure = from_bytes((path / STRUCTURE).read_bytes())
        structures.append(structure)
        tensors.update(state.targets(structure))

    ranks.run(what, prepare)  # whatever does not fit is found here, before anything changes
    try:
        _storage.load(tensors, path, ranks.process_group)
    except CheckpointError as error:
        raise CheckpointError(f"{what} failed on {error}") from error

    def apply() -> None:
        state.apply(structures[0], tensors)
        _resume_random(path, manifest, ranks.rank)

    ranks.run(what, apply)


def _resume_random(path: Path, manifest: dict[str, Any], rank: int) -> None:
    first = from_bytes((path / random_file(0)).read_bytes())
    if rank < manifest["ranks"]:
        _random.restore(from_bytes((path / random_file(rank)).read_bytes()))
    elif manifest["seeded alike"]:
        _random.restore(first)
    else:
        _random.seed_anew(first, rank)
