"""A run as arrays over its steps, ready to be drawn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .record import QUANTILES, Numbers, Record, Spread, Summary, names_of
from .run import Run
from .statistics import Array

# More points than that are averaged in equal parts.
MOST_POINTS = 240


@dataclass(frozen=True, eq=False)
class Series:
    """The summaries of one group of parameters, or of the tasks, over a run.

    Attributes:
        name: Of the group.
        steps: The steps [T].
        summaries: One for each step.
        names: The names of the objectives.
    """

    name: str
    steps: Array
    summaries: Sequence[Summary]
    names: Sequence[str]

    def number(self, name: str) -> Array:
        """One of the numbers of the summaries: [T]."""
        return np.array([getattr(summary, name) for summary in self.summaries], dtype=float)

    def values(self, name: str) -> Array | None:
        """One number for each objective [T, m], or None if distributions were recorded."""
        found: list[Numbers | None] = [getattr(summary, name) for summary in self.summaries]
        arrays = [values for values in found if isinstance(values, np.ndarray)]
        if len(arrays) < len(found) or not arrays:
            return None
        return np.stack(arrays)

    def quantiles(self, name: str) -> Array | None:
        """The quantiles [T, 7], or None if there are none."""
        found = [getattr(summary, name) for summary in self.summaries]
        spreads = [values.quantiles for values in found if isinstance(values, Spread)]
        return np.stack(spreads) if spreads and len(spreads) == len(found) else None

    def histograms(self) -> Array | None:
        """The numbers of pairs by cosine [T, BINS], or None if there are none."""
        found = [summary.cosines for summary in self.summaries]
        counts = [c.histogram for c in found if isinstance(c, Spread) and c.histogram is not None]
        return np.stack(counts) if counts and len(counts) == len(found) else None


def groups_of(run: Run) -> list[Series]:
    """The groups that were weighed: mostly one, of all parameters."""
    return _series(run.alike if run.records else [], lambda record: record.groups)


def layers_of(run: Run) -> list[Series]:
    """The layers where they were recorded; else the groups if there are several."""
    records = [record for record in (run.alike if run.records else []) if record.layers]
    if records:
        names = [layer.name for layer in records[-1].layers]
        records = [r for r in records if [layer.name for layer in r.layers] == names]
        return _series(records, lambda record: record.layers)
    groups = groups_of(run)
    return groups if len(groups) > 1 else []


def tasks_of(run: Run) -> list[Series]:
    """The tasks, if the objectives are samples x tasks."""
    records = [record for record in (run.alike if run.records else []) if record.tasks is not None]
    if records:
        count = records[-1].tasks.objectives if records[-1].tasks is not None else 0
        records = [r for r in records if r.tasks is not None and r.tasks.objectives == count]
    return _series(records, lambda record: [record.tasks] if record.tasks is not None else [])


def _series(
    records: Sequence[Record], parts: Callable[[Record], Sequence[Summary]]
) -> list[Series]:
    if not records:
        return []
    steps = np.array([record.step for record in records], dtype=float)
    columns = zip(*(parts(record) for record in records), strict=True)
    return [
        Series(
            column[-1].name,
            steps,
            column,
            names_of(records[-1].names, column[-1].objectives),
        )
        for column in columns
    ]


def thinned(steps: Array, values: Array, most: int = MOST_POINTS) -> tuple[Array, Array]:
    """Steps [T] and values [T, ...], averaged over equal parts if there are many."""
    if len(steps) <= most:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), most)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # parts of NaN alone
        means = [np.nanmean(values[part], axis=0) for part in parts]
    return np.array([steps[part].mean() for part in parts]), np.array(means)


def smoothed(values: Array, width: int, *, means: bool = False) -> Array:
    """Medians or means over ``width`` neighbours of values [T, m], fewer at the ends; NaN left
    out. Medians keep single outliers out; means suit shares, which take few values."""
    half, middle = width // 2, np.nanmean if means else np.nanmedian
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # windows of NaN alone
        found = [
            middle(values[max(0, i - half) : i + half + 1], axis=0) for i in range(len(values))
        ]
    return np.array(found)


def latest_mean(values: Sequence[Array], share: float = 0.25) -> Array:
    """The mean over the last share of the records, at least one; NaN left out."""
    count = max(1, round(share * len(values)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NaN alone
        mean: Array = np.nanmean(np.stack(list(values[-count:])), axis=0)
    return mean


MEDIAN = QUANTILES.index(0.5)
