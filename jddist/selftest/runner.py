"""Runs checks in step on all ranks and gathers what they found.

Results travel through the store, not through the backend that is under test: a rank that raised is
heard of even while the others wait in a collective.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch.distributed as dist

from .checks import Check, Finding
from .ranks import Ranks

Outcome = Literal["passed", "FAILED", "skipped", "not run"]

# What a rank needs beyond the group's timeout to say that it ran into it.
_GRACE = 5.0


@dataclass
class Result:
    """What all ranks found in one check.

    Attributes:
        name: The check's name.
        outcome: "FAILED" if any rank's error is too large, or any rank raised.
        error: The largest over the ranks; NaN if a rank raised.
        tolerance: The largest error that passes.
        seconds: The longest time that a rank took.
        detail: A note, or what went wrong and on which ranks.
    """

    name: str
    outcome: Outcome = "not run"
    error: float = float("nan")
    tolerance: float = 0.0
    seconds: float = 0.0
    detail: str = ""


@dataclass
class Progress:
    """The results so far, readable from another thread."""

    results: list[Result] = field(default_factory=list)
    current: str = "starting"


def run(ranks: Ranks, checks: Sequence[Check], progress: Progress | None = None) -> list[Result]:
    """Runs all checks; every rank has to call, with the same ones.

    After an exception on any rank the others' collectives may pair with the wrong ones: the checks
    that follow are not run.

    Args:
        ranks: This rank.
        checks: What to run, in order.
        progress: Kept up to date, if given.

    Returns:
        One result for each check, the same on every rank.
    """
    progress = progress or Progress()
    progress.results[:] = [Result(check.name) for check in checks]
    for number, check in enumerate(checks):
        progress.current = check.name
        progress.results[number] = result = _run_one(ranks, number, check)
        if result.error != result.error and result.outcome == "FAILED":
            break
    progress.current = "ending"
    return progress.results


def _run_one(ranks: Ranks, number: int, check: Check) -> Result:
    raised = ""
    started = time.perf_counter()
    try:
        finding = check.function(ranks)
        ranks.synchronize()
    except Exception as error:  # whatever a backend raises is a result
        finding, raised = Finding(), f"{type(error).__name__}: {error}"
    own = {**asdict(finding), "raised": raised, "seconds": time.perf_counter() - started}
    return _joined(check.name, _exchange(ranks, number, own))


def _exchange(ranks: Ranks, number: int, own: dict) -> list[dict]:
    """Every rank's finding; of a rank that does not answer, that it did not."""
    ranks.store.set(f"{number}/{ranks.rank}", json.dumps(own))
    deadline = time.monotonic() + ranks.timeout + _GRACE
    found = []
    for rank in range(ranks.size):
        text = _get(ranks.store, f"{number}/{rank}", lambda: time.monotonic() < deadline)
        if text is None:
            found.append({**asdict(Finding()), "raised": "it did not answer", "seconds": 0.0})
        else:
            found.append(json.loads(text))
    return found


def finish(ranks: Ranks) -> None:
    """Waits a while for all ranks to have read all results, where rank 0 may hold the store."""
    ranks.store.set(f"end/{ranks.rank}", "")
    deadline = time.monotonic() + _GRACE
    for rank in range(ranks.size):
        _get(ranks.store, f"end/{rank}", lambda: time.monotonic() < deadline)


def _get(store: dist.Store, key: str, may_wait: Callable[[], bool]) -> bytes | None:
    while not store.check([key]):
        if not may_wait():
            return None
        time.sleep(0.005)
    return store.get(key)


def _joined(name: str, found: list[dict]) -> Result:
    first = found[0]
    seconds = max(f["seconds"] for f in found)
    raised = _by_rank([f["raised"] for f in found])
    if raised:
        return Result(name, "FAILED", float("nan"), first["tolerance"], seconds, raised)
    if first["skipped"]:
        return Result(name, "skipped", 0.0, 0.0, seconds, first["skipped"])
    error = max((f["error"] for f in found), key=lambda e: (e != e, e))
    tolerance = first["tolerance"]
    result = Result(name, "passed", error, tolerance, seconds, first["note"])
    if len({f["same"] for f in found}) > 1:
        result.outcome = "FAILED"
        result.error = max(result.error, float("inf"))
        result.detail = f"the ranks differ: {_by_rank([f['same'] for f in found])}"
    elif not error <= tolerance:
        wrong = [rank for rank, f in enumerate(found) if not f["error"] <= tolerance]
        result.outcome = "FAILED"
        result.error = float("inf") if error != error else error
        result.detail = f"wrong on rank{'s' if len(wrong) > 1 else ''} {_ranges(wrong)}"
    return result


def _by_rank(texts: list[str]) -> str:
    """Which ranks say what, with ranks that say the same together."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        if text:
            ranks.setdefault(text, []).append(rank)
    return "; ".join(f"rank {_ranges(who)}: {text}" for text, who in ranks.items())


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
