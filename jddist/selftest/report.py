"""The results as a table for people, or as JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

from .ranks import Ranks
from .runner import Result


def summary(ranks: Ranks) -> dict[str, object]:
    """What was checked: the group of ranks."""
    return {"ranks": ranks.size, "backend": ranks.backend, "device": ranks.device.type}


def table(results: Sequence[Result], ranks: Ranks, seconds: float) -> str:
    """One line for each check, and a last one with the verdict."""
    width = max(len(result.name) for result in results)
    head = f"{'check':<{width}}  result    error    allowed  seconds  "
    words = " ".join(f"{key} {value}," for key, value in summary(ranks).items())
    lines = [f"jddist selftest: {words} float64", "", head, "-" * len(head)]
    lines += [_line(result, width) for result in results]
    lines += ["", _verdict(results, seconds)]
    return "\n".join(lines)


def _line(result: Result, width: int) -> str:
    ran = result.outcome in ("passed", "FAILED") and not math.isnan(result.error)
    error = f"{result.error:.1e}" if ran else "-"
    allowed = f"{result.tolerance:.0e}" if ran else "-"
    cells = f"{result.outcome:<8}  {error:<7}  {allowed:<7}  {result.seconds:7.2f}"
    return f"{result.name:<{width}}  {cells}  {result.detail}".rstrip()


def succeeded(results: Sequence[Result]) -> bool:
    """Whether every check ran, and none failed."""
    return all(result.outcome in ("passed", "skipped") for result in results)


def _verdict(results: Sequence[Result], seconds: float) -> str:
    counts = {
        outcome: sum(result.outcome == outcome for result in results)
        for outcome in ("passed", "FAILED", "skipped", "not run")
    }
    listed = ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n)
    return f"{'ok' if succeeded(results) else 'NOT ok'}: {listed}, in {seconds:.1f} s"


def as_json(results: Sequence[Result], ranks: Ranks, seconds: float) -> str:
    """The same for programs; numbers that JSON has no words for are null."""
    checks = []
    for result in results:
        record = asdict(result)
        if not math.isfinite(result.error):
            record["error"] = None
        checks.append(record)
    content = {**summary(ranks), "ok": succeeded(results), "seconds": seconds, "checks": checks}
    return json.dumps(content)
