"""``Checkpointer``: saves and resumes a whole training run."""

from __future__ import annotations

import hashlib
import json
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
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from jddist._progress import enter, progress
from jddist.errors import CheckpointError

from . import _random
from ._directory import Directory
from ._ranks import Ranks
from ._reading import checked_manifest, read_checkpoint
from ._state import RunState
from ._structure import to_bytes
from ._writing import Snapshot, write_checkpoint


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
        self._pending: Future[None] | None = None

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
        snapshots: list[Snapshot] = []

        def capture() -> dict[str, Any]:
            structure, tensors = self._state.capture()
            place = json.dumps(dict(position or {}), sort_keys=True)
            random_state = to_bytes(_random.capture())
            snapshots.append(Snapshot(step, place, to_bytes(structure), tensors, random_state))
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
                manifest = checked_manifest(self._ranks, self._directory, name)
            except CheckpointError as error:
                skipped[name] = str(error)
                self._corrupt.add(name)
                if self._ranks.rank == 0:
                    warnings.warn(f"Passed over a damaged checkpoint. {error}", stacklevel=2)
                continue
            return self._load(name, manifest, skipped)
        enter("forward")
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
        return self._load(name, checked_manifest(self._ranks, self._directory, name), {})

    def _write(self, snapshot: Snapshot) -> None:
        ranks, directory = self._ranks, self._directory
        name = write_checkpoint(ranks, directory, snapshot)

        def tidy_up() -> None:
            directory.point_to(name)
            directory.prune(self._keep, self._corrupt)

        ranks.run_on_first(f"Tidying up after the checkpoint {name}, which is complete,", tidy_up)
        self._corrupt.clear()

    def _load(self, name: str, manifest: dict[str, Any], skipped: dict[str, str]) -> Loaded:
        path = self.directory / name
        read_checkpoint(self._ranks, self._state, path, manifest)
        progress.step = manifest["step"]
        enter("forward")
        return Loaded(manifest["step"], manifest["position"], path, skipped)
