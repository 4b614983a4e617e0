"""Who lags: turns the failure of a collective into an error that names rank, step and stage."""

from __future__ import annotations

import atexit
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch.distributed as dist

from jddist._progress import STAGES, progress
from jddist.errors import JddistError, StalledRankError

from .watch import ALIVE, BEAT, LEFT, RAISED, WAITS, Report, Watch

# How long to look for signs of life from other machines.
_PATIENCE = 3 * BEAT
# In its log a rank says who lags when it has been in one stage for this part of the timeout.
_LOGGED = 0.8
_FAILURES = re.compile(
    r"gloo/|\bNCCL\b|[Cc]onnection (closed|reset|refused)|Broken pipe|[Tt]imed? ?out", re.DOTALL
)

_watch: Watch | None = None
_world: dist.ProcessGroup | None = None
_timeout: float | None = None
_logged: tuple[int, str] | None = None
_hooked = False


def start(timeout: float | None) -> None:
    """Starts to report where this rank is, once for all groups.

    Args:
        timeout: Seconds after which collectives give up, if known.
    """
    global _watch, _world, _timeout
    if os.environ.get("JDDIST_WATCH") == "0" or dist.get_backend() == "fake":
        return
    _timeout = timeout if _timeout is None or timeout is None else min(timeout, _timeout)
    if _world is dist.group.WORLD:
        return
    stop()
    world = dist.group.WORLD
    assert world is not None
    try:
        store = world.get_group_store()
        _watch = Watch(store, dist.get_rank(), _every_beat)
    except (AttributeError, RuntimeError):  # a store that cannot be copied, or none
        return
    _world, _timeout = world, timeout
    progress.listener = _watch.publish
    _hook()


def stop() -> None:
    """Ends the reports."""
    global _watch, _world
    watch, _watch, _world = _watch, None, None
    progress.listener = None
    if watch is not None:
        watch.stop()


def note(message: str) -> None:
    """What this rank ran into, for those who may soon wait for it in vain; "" for nothing."""
    if _watch is not None:
        _watch.note(message)


@contextmanager
def naming(ranks: Sequence[int]) -> Iterator[None]:
    """Within this context, a collective that fails says on whose account.

    Args:
        ranks: The ranks that take part, by their numbers among all.

    Raises:
        StalledRankError: Instead of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_failure(error):
            raise
        raise StalledRankError(_explained(ranks, error)) from error


def is_failure(error: BaseException) -> bool:
    """Whether an exception is the failure of a collective, for want of another rank."""
    if isinstance(error, JddistError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or bool(_FAILURES.search(str(error)))


def _explained(ranks: Sequence[int], error: BaseException) -> str:
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    place = f"step {progress.step}, {progress.stage}"
    watch = _watch
    if watch is None:
        found = "a collective that failed, of ranks that do not report where they are"
        own = "this rank"
    else:
        watch.end(WAITS)
        found = _found(watch, ranks)
        own = f"rank {watch.rank}"
        _linger(watch, ranks)
    return (
        f"Found {found}, while {own} waited in {place}; expected every rank to take part within "
        "the group's timeout. The process group is of no use any more: start all ranks again, "
        f"from a checkpoint (torchrun --max-restarts does). torch said: {said}"
    )


def _found(watch: Watch, ranks: Sequence[int]) -> str:
    """In words, whom this rank waits for."""
    others = [rank for rank in ranks if rank != watch.rank]
    first = reports = watch.read(others)
    near = all(report.identity.look() != "unknown" for report in first.values())
    deadline = time.monotonic() + (BEAT if near else _PATIENCE)
    while not watch.lost:
        culprits = _culprits(reports, {})
        if culprits or time.monotonic() > deadline:
            break
        time.sleep(BEAT / 10)
        reports = watch.read(others)
    culprits = _culprits(reports, {} if watch.lost else first) or _behind(reports)
    if culprits:
        return _listed(culprits)
    if watch.lost:
        return "the store gone, which rank 0 holds, so that it has ended or stopped as a rule"
    silent = [f"rank {rank}" for rank in others if rank not in reports]
    seen = [f"rank {r.rank} in {r.place} ({r.status})" for r in reports.values()]
    if silent:
        return f"no report of {_listed(silent)}, which never came to a call of jddist"
    return f"no rank that lags ({_listed(seen)})"


def _culprits(reports: dict[int, Report], before: dict[int, Report]) -> list[str]:
    """The ranks that ended, stopped, or gave no sign since ``before``."""
    found = []
    in_ = "in" if _watch is None or not _watch.lost else "last seen in"
    for report in reports.values():
        where = f"{in_} {report.place}"
        now = report.identity.look()
        age = f"for {time.time() - report.since:.0f} s"
        earlier = before.get(report.rank)
        if report.status == RAISED:
            found.append(f"rank {report.rank} ended by {report.message} in {report.place}")
        elif report.status == LEFT:
            found.append(f"rank {report.rank} at the end of its program, after {report.place}")
        elif report.status == WAITS:
            continue  # for the same rank as this one
        elif report.message:
            found.append(f"rank {report.rank} after {report.message} in {report.place}, {age}")
        elif now == "dead":
            pid = report.identity.pid
            found.append(f"rank {report.rank} dead (process {pid} has ended) {where}")
        elif now == "stopped":
            pid = report.identity.pid
            found.append(f"rank {report.rank} stopped (process {pid} is suspended) {where}, {age}")
        elif now == "unknown" and earlier is not None and earlier.beat == report.beat:
            found.append(f"rank {report.rank} without a sign of life, last in {report.place}")
    return found


def _behind(reports: dict[int, Report]) -> list[str]:
    """The ranks that live and are not as far as this one."""
    mine = (progress.step, STAGES.index(progress.stage))
    found = []
    for report in reports.values():
        theirs = (report.step, STAGES.index(report.stage))
        if report.status == ALIVE and theirs < mine:
            age = time.time() - report.since
            found.append(f"rank {report.rank} still in {report.place}, for {age:.0f} s")
    return found


def _listed(parts: Sequence[str]) -> str:
    return "; ".join(parts[:8]) + (f"; and {len(parts) - 8} more" if len(parts) > 8 else "")


def _linger(watch: Watch, ranks: Sequence[int]) -> None:
    """The rank that holds the store stays until the others have read it too."""
    if not watch.first_holds_store or watch.rank != 0:
        return
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and not watch.lost:
        reports = watch.read(rank for rank in ranks if rank != 0)
        if not any(r.status == ALIVE and r.identity.look() == "runs" for r in reports.values()):
            time.sleep(BEAT / 2)  # they said that they wait, and look around now
            return
        time.sleep(BEAT / 10)


def _every_beat() -> bool:
    """Says in the log who lags, before the backend ends this process; whether to go on."""
    global _logged
    watch = _watch
    if watch is None or not dist.is_initialized() or dist.group.WORLD is not _world:
        return False
    if _timeout is None or time.time() - progress.since < _LOGGED * _timeout:
        return True
    where = (progress.step, progress.stage)
    if where == _logged:
        return True
    reports = watch.read(r for r in range(dist.get_world_size()) if r != watch.rank)
    culprits = _culprits(reports, {})
    if not culprits and progress.stage not in ("forward", "checkpoint"):
        culprits = _behind(reports)
    if culprits and where == (progress.step, progress.stage):
        _logged = where
        _say(
            f"rank {watch.rank} has been in step {where[0]}, {where[1]}, for "
            f"{time.time() - progress.since:.0f} s. Found {_listed(culprits)}."
        )
    return True


def _say(text: str) -> None:
    print(f"jddist: {text}", file=sys.stderr, flush=True)


def _hook() -> None:
    """Lets the others know of the end of this program, by an exception or not."""
    global _hooked
    if _hooked:
        return
    _hooked = True
    previous = sys.excepthook

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        watch = _watch
        if watch is not None and not isinstance(error, StalledRankError | KeyboardInterrupt):
            if is_failure(error):  # in a collective of the user's own, or of the wrapper's
                _say(_explained(range(dist.get_world_size()), error))
            else:
                watch.end(RAISED, f"{kind.__name__}: {error}")
        previous(kind, error, trace)

    sys.excepthook = excepthook
    atexit.register(_at_exit)


def _at_exit() -> None:
    watch = _watch
    if watch is None:
        return
    if dist.is_initialized() and dist.group.WORLD is _world:
        watch.end(LEFT)
    stop()
