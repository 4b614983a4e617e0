"""What a check is, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .ranks import Ranks


@dataclass(frozen=True)
class Finding:
    """What a check found on one rank.

    Attributes:
        error: How far the result is from the expected one.
        tolerance: The largest error that passes.
        note: A few words for the table, e.g. a measured speed.
        same: What has to be the same on every rank, e.g. a digest of the weights.
        skipped: Why there was nothing to check, if so; the same on every rank.
    """

    error: float = 0.0
    tolerance: float = 0.0
    note: str = ""
    same: str = ""
    skipped: str = ""


@dataclass(frozen=True)
class Check:
    """A named function that every rank calls; it may raise."""

    name: str
    function: Callable[[Ranks], Finding]
