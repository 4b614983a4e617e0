"""Requests to stop, such as a scheduler's SIGTERM: noted, and agreed on by all ranks."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from jddist.distribution.collectives import Group


class StopSignals:
    """Within this context, signals do not end the process but ask it to stop at a good moment.

    ``torchrun`` passes a SIGTERM on to its workers, and kills those that still run after 30 s. It
    does not reach all ranks in the same step: ask ``requested`` after each one, which tells every
    rank the same. A second signal of the kind ends the process as it would have without this.

    Args:
        signals: What is caught. SLURM can send SIGUSR1 some time before the end (``--signal``).
        process_group: The ranks that agree; by default all that run.

    Raises:
        ValueError: This is not the main thread, where alone Python takes signals.
    """

    def __init__(
        self,
        signals: Iterable[signal.Signals] = (signal.SIGTERM,),
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        self._group = Group(process_group)
        self._signals = tuple(signals)
        self._before: dict[signal.Signals, Any] = {}
        self._own: signal.Signals | None = None

    def __enter__(self) -> StopSignals:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def requested(self) -> signal.Signals | None:
        """The signal that any rank got, the same on every rank; None if none did.

        Every rank has to call. It costs one message of eight bytes to each.
        """
        own = 0 if self._own is None else int(self._own)
        found = int(self._group.gather_header(torch.tensor([own])).max())
        return signal.Signals(found) if found else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._own = signal.Signals(number)
        signal.signal(number, self._before[self._own])
