"""``Checkpointer``: saves and resumes a whole training run."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from jddist._progress import enter, progress
from jddist._version import __version__
from jddist.errors import CheckpointError

from . import _random, _storage
from ._directory import Directory, fingerprint, write
from ._ranks import Ranks
from ._state import RunState
from ._structure import from_bytes, to_bytes

_STRUCTURE = "structure.pt"


class HasState(Protocol):
    """A scheduler, a GradScaler, a sampler, a weighting: what has a state and takes it back."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass(frozen=True)
class Loaded:
    """What was resumed from.

    Attributes:
        step: The step that was given to ``save``.
        position: The position that was given to ``save``.
        path: The directory of the checkpoint.
        skipped: Why newer checkpoints were passed over, by name.
    """

    step: int
    position: dict[str, Any]
    path: Path
    skipped: dict[str, str]


@dataclass(frozen=True)
class _Snapshot:
    """A run at the moment of a save. Nothing here changes with the run, once tensors are staged."""

    step: int
    position: str
    structure: bytes
    tensors: dict[str, Tensor]
    random: bytes


class Checkpointer:
    """Saves and resumes a model with all else that the next step depends on.

    A checkpoint holds the model, the optimizers, whatever else has a ``state_dict`` (a scheduler, a
    weighting or aggregator, a scalarizer, a GradScaler), generators, each rank's default random
    states, and the position in the data. The model may be in DistributedDataParallel or
    ``fully_shard``, and another number of ranks, or another of these wrappers, may load it: the
    next step is then the same.

    A checkpoint appears under its name when it is complete, by one rename, so that a kill at any
    moment leaves the ones before intact. It is read without unpickling.

    Args:
        directory: Where checkpoints are; all ranks have to see the same one.
        model: The model, wrapped or not.
        optimizers: Its optimizer or optimizers.
        others: What else has a state, by name: anything with ``state_dict`` and
            ``load_state_dict``, or a ``torch.Generator``. The same on every rank, but for DTensors.
        keep: How many checkpoints are kept.
        process_group: The ranks that train together; by default all.

    Raises:
        ValueError: ``keep`` is less than 1.

    Every rank has to make every call. Of an aggregator with state of the size of the Jacobian
    (ExcessMTL, MoCo, DBMTL), call ``allocate_state`` before ``load_latest``: each rank then reads
    its own columns; otherwise every rank reads all of them, and keeps its own.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
        *,
        others: Mapping[str, HasState | torch.Generator] | None = None,
        keep: int = 3,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"Found keep={keep}; expected at least 1.")
        if isinstance(optimizers, torch.optim.Optimizer):
            optimizers = [optimizers]
        self._state = RunState(model, list(optimizers), dict(others or {}))
        self._directory = Directory(Path(directory).absolute())
        self._keep = keep
        self._ranks = Ranks(process_group)
        self._corrupt: set[str] = set()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="jddist-checkpoint")
        self._pending: Future[Path] | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()

    @property
    def directory(self) -> Path:
        """Where checkpoints are."""
        return self._directory.path

    def names(self) -> list[str]:
        """The complete checkpoints, the newest first. Looks at this process's file system only."""
        return self._directory.names()

    def save(
        self, step: int, position: Mapping[str, Any] | None = None, *, wait: bool = True
    ) -> None:
        """Writes a checkpoint.

        Args:
            step: The number of steps taken so far.
            position: Where the run is in its data, as JSON values, the same on every rank: the
                epoch, say, and the number of samples of all ranks that it has seen of it.
            wait: Whether to return only when the checkpoint is on the disk. Otherwise it is copied
                to host memory and written in the background, and what goes wrong there is raised
                by the next call of ``save``, ``wait`` or ``close``.

        Raises:
            CheckpointError: It could not be written, for want of room, say. The same on every
                rank; the checkpoints before are untouched, and training may go on.
        """
        self.wait()
        enter("checkpoint")
        snapshots: list[_Snapshot] = []

        def capture() -> dict[str, Any]:
            structure, tensors = self._state.capture()
            place = json.dumps(dict(position or {}), sort_keys=True)
            random_state = to_bytes(_random.capture())
            snapshots.append(_Snapshot(step, place, to_bytes(structure), tensors, random_state))
            sharded = sorted(n for n, t in tensors.items() if isinstance(t, DTensor))
            names = json.dumps([sorted(tensors), sharded])
            digest = hashlib.blake2b(names.encode(), digest_size=8).hexdigest()
            return {"step": step, "position": place, "names of state (digest)": digest}

        told = self._ranks.run("Saving a checkpoint", capture)
        for name, value in told[0].items():
            if any(of_rank[name] != value for of_rank in told):
                listed = ", ".join(f"rank {r}: {of_rank[name]}" for r, of_rank in enumerate(told))
                raise CheckpointError(
                    f"Found ranks that save another {name} ({listed}); expected the same on every "
                    "rank. What differs between ranks, such as a time, take from rank 0."
                )
        (snapshot,) = snapshots
        if wait:
            self._write(snapshot)
            enter("forward")
            return
        stager = DefaultStager(StagingOptions(False, False, False, False))
        staged = stager.stage(snapshot.tensors)
        stager.close()
        assert isinstance(staged, dict)
        self._pending = self._worker.submit(self._write, replace(snapshot, tensors=staged))
        enter("forward")

    def wait(self) -> None:
        """Returns when the save in the background, if any, is on the disk.

        Raises:
            CheckpointError: It could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the save in the background, and ends its thread.

        Raises:
            CheckpointError: It could not be written.
        """
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def load_latest(self) -> Loaded | None:
        """Resumes from the newest checkpoint that is intact.

        One that is damaged is passed over with a warning on rank 0, for the one before it.

        Returns:
            Where it was, or None if there is no checkpoint at all: nothing was changed then.

        Raises:
            CheckpointError: No checkpoint is intact, or it is one of another model. The same on
                every rank.
        """
        self.wait()
        enter("checkpoint")
        names = self._ranks.run_on_first("Looking for checkpoints", self._directory.names)
        skipped: dict[str, str] = {}
        for name in names:
            try:
                manifest = self._checked(name)
            except CheckpointError as error:
                skipped[name] = str(error)
                self._corrupt.add(name)
                if self._ranks.rank == 0:
                    warnings.warn(f"Passed over a damaged checkpoint. {error}", stacklevel=2)
                continue
            return self._load(name, manifest, skipped)
        if skipped:
            raise CheckpointError(
                f"Found no intact checkpoint in {self.directory}: {'; '.join(skipped.values())}. "
                "Restore one from a backup, or name another directory to start anew."
            )
        return None

    def load(self, name: str) -> Loaded:
        """Resumes from a certain checkpoint.

        Args:
            name: One of ``names()``.

        Raises:
            CheckpointError: It is damaged, or of another model. The same on every rank.
        """
        self.wait()
        enter("checkpoint")
        return self._load(name, self._checked(name), {})

    def _write(self, snapshot: _Snapshot) -> Path:
        ranks, step = self._ranks, snapshot.step
        begun: list[str] = []

        def begin() -> str:
            name, _ = self._directory.begin(step)
            begun.append(name)
            return name

        what = f"Saving the checkpoint of step {step} in {self.directory}"
        try:
            name = ranks.run_on_first(what, begin)
            partial = self._directory.partial(name)
            try:
                _storage.save(snapshot.tensors, partial, ranks.process_group)
            except CheckpointError as error:
                raise CheckpointError(f"{what} failed on {error}") from error

            def write_rest() -> dict[str, Any]:
                write(partial / f"random-{ranks.rank}.pt", snapshot.random)
                mine = [f"random-{ranks.rank}.pt"]
                mine += [p.name for p in partial.glob(f"__{ranks.rank}_*.distcp")]
                if ranks.rank == 0:
                    write(partial / _STRUCTURE, snapshot.structure)
                    mine += [_STRUCTURE, ".metadata"]
                files = {file: fingerprint(partial / file) for file in mine}
                return {"files": files, "random": _random.digest(from_bytes(snapshot.random))}

            told = ranks.run(what, write_rest)
            manifest = {
                "step": step,
                "position": json.loads(snapshot.position),
                "ranks": ranks.size,
                "seeded alike": len({t["random"] for t in told}) == 1,
                "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "jddist": __version__,
                "torch": torch.__version__,
                "files": {file: entry for t in told for file, entry in t["files"].items()},
            }
            ranks.run_on_first(what, lambda: self._directory.finish(name, manifest))
        except Exception as error:
            for name in begun:
                self._directory.abandon(name)
            if isinstance(error, CheckpointError):
                raise CheckpointError(
                    f"{error}. No checkpoint was added; those that were there are untouched."
                ) from error
            raise

        def tidy_up() -> None:
            self._directory.point_to(name)
            self._directory.prune(self._keep, self._corrupt)

        ranks.run_on_first(f"Tidying up after the checkpoint {name}, which is complete,", tidy_up)
        self._corrupt.clear()
        return self.directory / name

    def _checked(self, name: str) -> dict[str, Any]:
        """The manifest of a checkpoint, all of whose files are intact."""
        what = f"Reading the checkpoint {name} in {self.directory}"
        manifest: dict[str, Any] = self._ranks.run_on_first(
            what, lambda: self._directory.manifest(name)
        )
        files = sorted(manifest["files"].items())
        mine = dict(files[self._ranks.rank :: self._ranks.size])  # each rank checks some
        self._ranks.run(what, lambda: self._directory.check(name, mine))
        return manifest

    def _load(self, name: str, manifest: dict[str, Any], skipped: dict[str, str]) -> Loaded:
        ranks, path = self._ranks, self.directory / name
        what = f"Loading the checkpoint {name} in {self.directory}"
        tensors: dict[str, Tensor] = {}
        structures: list[list[Any]] = []

        def prepare() -> None:
            structure = from_bytes((path / _STRUCTURE).read_bytes())
            structures.append(structure)
            tensors.update(self._state.targets(structure))

        ranks.run(what, prepare)  # whatever does not fit is found here, before anything changes
        try:
            _storage.load(tensors, path, ranks.process_group)
        except CheckpointError as error:
            raise CheckpointError(f"{what} failed on {error}") from error

        def apply() -> None:
            self._state.apply(structures[0], tensors)
            self._resume_random(path, manifest)

        ranks.run(what, apply)
        progress.step = manifest["step"]
        enter("forward")
        return Loaded(manifest["step"], manifest["position"], path, skipped)

    def _resume_random(self, path: Path, manifest: dict[str, Any]) -> None:
        saved, rank = manifest["ranks"], self._ranks.rank
        first = from_bytes((path / "random-0.pt").read_bytes())
        if rank < saved:
            _random.restore(from_bytes((path / f"random-{rank}.pt").read_bytes()))
        elif manifest["seeded alike"]:
            _random.restore(first)
        else:
            _random.seed_anew(first, rank)
