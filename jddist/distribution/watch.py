"""Tells the other ranks where this one is, and reads where they are.

Each rank writes its step and stage to the store by which the ranks met: at every change, which
takes some microseconds, and every second as a sign of life. So whoever waits in vain can say for
whom.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from jddist._progress import progress

from .processes import Identity

BEAT = 1.0  # seconds between signs of life
ALIVE, WAITS, RAISED, LEFT = "alive", "waits", "raised", "left"
# The attempts of torchrun --max-restarts may share a store.
_KEY = f"jddist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/rank/"
# One server takes some 1e5 messages a second; all ranks together send a tenth of that at most.
_PER_RANK = 1e-4
# The first messages go out at once; then there is some time between them, as in steps that take
# milliseconds they would count.
_FIRST, _PAUSE = 200, 2e-3
# A file only grows: after so many messages it gets signs of life alone.
_MANY = 10_000


@dataclass(frozen=True)
class Report:
    """What a rank last said of itself.

    Attributes:
        rank: The rank, among all.
        beat: Counts its messages.
        step: The number of steps that it has finished.
        stage: Its stage, one of ``jddist._progress.STAGES``.
        since: When it entered the stage, in seconds of ``time.time``.
        status: "alive", or how it ended: "waits" (in vain, for another rank), "raised", "left".
        message: The exception that it raised, or ran into and goes on.
        identity: Its process.
    """

    rank: int
    beat: int
    step: int
    stage: str
    since: float
    status: str
    message: str
    identity: Identity

    @property
    def place(self) -> str:
        """The step and stage in words."""
        return f"step {self.step}, {self.stage}"


class Watch:
    """This rank's reports, and its view of the others'.

    Args:
        store: The store of all ranks.
        rank: This rank among all.
        every_beat: Called every second by the thread that gives the signs of life.
    """

    def __init__(self, store: dist.Store, rank: int, every_beat: Callable[[], bool]) -> None:
        self.rank = rank
        # Two connections: one that waits for an answer must not keep the other from being used.
        self._writer, self._reader = (store.clone() for _ in range(2))  # type: ignore[attr-defined]
        self._identity = Identity.own()
        self._lock = threading.Lock()
        self._beat, self._written = 0, 0.0
        self._status, self._message = ALIVE, ""
        self._size = dist.get_world_size()
        self._in_file = isinstance(_innermost(store), dist.FileStore)
        self._every_beat = every_beat
        self._stopped = threading.Event()
        self._first: Report | None = None
        self.lost = False
        # Without torchrun's own, the first rank holds the store, which ends with it.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.first_holds_store = not agent and isinstance(_innermost(store), dist.TCPStore)
        self.publish(force=True)
        self._thread = threading.Thread(target=self._run, name="jddist-watch", daemon=True)
        self._thread.start()

    def publish(self, *, force: bool = False) -> None:
        """Writes this rank's report, unless the last one is too recent."""
        now = time.monotonic()
        interval = 0.0
        if self._beat > _FIRST:
            many = self._in_file and self._beat > _MANY
            interval = BEAT if many else max(_PER_RANK * self._size, _PAUSE)
        if self.lost or (not force and now - self._written < interval):
            return
        # Never wait here: what is not written now, the thread writes within a second.
        if not self._lock.acquire(timeout=BEAT if force else 0):
            return
        try:
            self._beat += 1
            self._written = now
            state = (self._beat, progress.step, progress.stage, progress.since)
            content = json.dumps([*state, self._status, self._message, *self._identity])
            self._writer.set(f"{_KEY}{self.rank}", content)
        except RuntimeError:  # whoever held the store is gone
            self.lost = True
        finally:
            self._lock.release()

    def end(self, status: str, message: str = "") -> None:
        """Writes how this rank ended. The first word counts."""
        if self._status == ALIVE:
            self._status, self._message = status, message[:500]
            self.publish(force=True)

    def note(self, message: str) -> None:
        """Writes what this rank ran into while it goes on; "" for nothing."""
        if self._status == ALIVE and message[:500] != self._message:
            self._message = message[:500]
            self.publish(force=True)

    def read(self, ranks: Iterable[int], timeout: float = 2.0) -> dict[int, Report]:
        """The reports of some ranks; of those that wrote one, while the store answers."""
        found: dict[int, Report] = {}

        def work() -> None:
            try:
                for rank in ranks:
                    report = self._read(rank)
                    if report is not None:
                        found[rank] = report
            except RuntimeError:
                self.lost = True

        if not self.lost:
            # A store that was stopped does not answer, and torch would wait for ever.
            thread = threading.Thread(target=work, name="jddist-watch-read", daemon=True)
            thread.start()
            thread.join(timeout)
            if thread.is_alive():
                self.lost = True
        found = dict(found)
        if self._first is not None:
            found.setdefault(0, self._first)
        return found

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * BEAT)

    def _read(self, rank: int) -> Report | None:
        key = f"{_KEY}{rank}"
        if not self._reader.check([key]):
            return None
        content: list[Any] = json.loads(self._reader.get(key))
        beat, step, stage, since, status, message, *process = content
        return Report(rank, beat, step, stage, since, status, message, Identity(*process))

    def _run(self) -> None:
        beat = BEAT / 20  # soon at first, so that nobody is unknown for long
        while not self._stopped.wait(beat) and not self.lost:
            beat = min(2 * beat, BEAT)
            if self.first_holds_store and self.rank != 0:
                # Where it was, once it is gone and the store with it.
                try:
                    self._first = self._read(0) or self._first
                except RuntimeError:
                    self.lost = True
                if self._first is not None and self._first.status == LEFT:
                    self.lost = True
            self.publish(force=True)
            if not self._every_beat():
                return


def _innermost(store: dist.Store) -> dist.Store:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store
