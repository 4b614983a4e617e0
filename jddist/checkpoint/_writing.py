"""Writes one checkpoint: by all ranks together, or not at all."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jddist._version import __version__
from jddist.errors import CheckpointError

from . import _random, _storage
from ._directory import Directory, fingerprint, write
from ._ranks import Ranks
from ._structure import from_bytes

STRUCTURE = "structure.pt"


@dataclass(frozen=True)
class Snapshot:
    """A run at the moment of a save. Nothing here changes with the run, once tensors are staged.

    Attributes:
        step: The number of steps taken.
        position: Where the run is in its data, as JSON.
        structure: The structure of its state, serialised.
        tensors: The tensors of its state.
        random: This rank's random states, serialised.
    """

    step: int
    position: str
    structure: bytes
    tensors: dict[str, Tensor]
    random: bytes


def random_file(rank: int) -> str:
    """The name of the file of a rank's random states."""
    return f"random-{rank}.pt"


def write_checkpoint(ranks: Ranks, directory: Directory, snapshot: Snapshot) -> str:
    """Writes a checkpoint, and gives it its name when all of it is on the disk.

    Args:
        ranks: All of them have to call.
        directory: Where to; rank 0 changes it.
        snapshot: This rank's part.

    Returns:
        The name.

    Raises:
        CheckpointError: Some rank could not write. The same on every rank; nothing was added.
    """
    what = f"Saving the checkpoint of step {snapshot.step} in {directory.path}"
    begun: list[str] = []

    def begin() -> str:
        name, _ = directory.begin(snapshot.step)
        begun.append(name)
        return name

    try:
        name: str = ranks.run_on_first(what, begin)
        partial = directory.partial(name)
        try:
            _storage.save(snapshot.tensors, partial, ranks.process_group)
        except CheckpointError as error:
            raise CheckpointError(f"{what} failed on {error}") from error
        told = ranks.run(what, lambda: _write_rest(ranks.rank, partial, snapshot))
        manifest = {
            "step": snapshot.step,
            "position": json.loads(snapshot.position),
            "ranks": ranks.size,
            "seeded alike": len({t["random"] for t in told}) == 1,
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "jddist": __version__,
            "torch": torch.__version__,
            "files": {file: entry for t in told for file, entry in t["files"].items()},
        }
        ranks.run_on_first(what, lambda: directory.finish(name, manifest))
    except Exception as error:
        for name in begun:
            directory.abandon(name)
        if isinstance(error, CheckpointError):
            raise CheckpointError(
                f"{error}. No checkpoint was added; those that were there are untouched."
            ) from error
        raise
    return name


def _write_rest(rank: int, partial: Path, snapshot: Snapshot) -> dict[str, Any]:
    """What is beside the tensors; the fingerprints of all files that this rank wrote."""
    write(partial / random_file(rank), snapshot.random)
    mine = [random_file(rank), *(p.name for p in partial.glob(f"__{rank}_*.distcp"))]
    if rank == 0:
        write(partial / STRUCTURE, snapshot.structure)
        mine += [STRUCTURE, ".metadata"]
    files = {file: fingerprint(partial / file) for file in mine}
    return {"files": files, "random": _random.digest(from_bytes(snapshot.random))}
