"""Lets ``digits.py`` go on where it was stopped, by a signal, a kill or a failure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from signal import Signals

import torch
import torch.distributed as dist
from _digits_report import Epoch
from torch import nn

from jddist.checkpoint import Checkpointer, StopSignals


@dataclass
class Position:
    """Where a run is.

    Attributes:
        epochs: What was measured after the epochs that are finished.
        batches: The batches of the next epoch that were trained on.
        seconds: How long those took.
    """

    epochs: list[Epoch] = field(default_factory=list)
    batches: int = 0
    seconds: float = 0.0


class Stopped(Exception):
    """A signal asked to stop, and a checkpoint was written."""

    def __init__(self, signal: Signals, path: Path) -> None:
        super().__init__(
            f"stopped by {signal.name}; the checkpoint {path} was written. The same command goes "
            "on from there."
        )
        self.exit_code = 128 + signal


class Keeper:
    """Writes checkpoints of one run every so many steps, or none at all.

    Args:
        folder: Where to; None for no checkpoints.
        every: Steps between checkpoints.
        stop: The requests to stop.
        network: What is trained.
        optimizer: Its optimizer.
    """

    def __init__(
        self,
        folder: Path | None,
        every: int,
        stop: StopSignals | None,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._every, self._stop, self._step = every, stop, 0
        self._checkpointer = None
        if folder is not None:
            self._checkpointer = Checkpointer(folder, network, optimizer, keep=2)

    def load(self) -> Position:
        """Resumes from the newest checkpoint; without one, from the start."""
        loaded = None if self._checkpointer is None else self._checkpointer.load_latest()
        if loaded is None:
            return Position()
        self._step = loaded.step
        found = Position(**loaded.position)
        found.epochs = [Epoch(**epoch) for epoch in loaded.position["epochs"]]
        return found

    def after_step(self, position: Position) -> None:
        """Writes a checkpoint if it is time to, or if a signal asks to stop."""
        self._step += 1
        if self._checkpointer is None:
            return
        assert self._stop is not None
        signal = self._stop.requested()
        if signal is None and self._step % self._every:
            return
        self._save(position, wait=signal is not None)
        if signal is not None:
            path = self._checkpointer.directory / self._checkpointer.names()[0]
            raise Stopped(signal, path)

    def finish(self, position: Position) -> None:
        """Writes down the end of the run, unless it was there already."""
        if self._checkpointer is not None:
            self._save(position, wait=True)
            self._checkpointer.close()

    def _save(self, position: Position, *, wait: bool) -> None:
        assert self._checkpointer is not None
        content = [asdict(position)]
        if dist.is_initialized():
            # The ranks' clocks differ, and a position is to be the same everywhere: rank 0's.
            dist.broadcast_object_list(content, src=0)
        self._checkpointer.save(self._step, content[0], wait=wait)
