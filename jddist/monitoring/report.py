"""``report``: everything that was recorded of a run, on one HTML page."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from jddist._version import __version__

from . import plots
from ._page import Card, Table, page
from ._series import Series, groups_of, latest_mean, layers_of, tasks_of
from ._svg import PAGE_THEME, inline_svg
from .record import QUANTILES
from .run import Run
from .statistics import CONFLICT

FILE_NAME = "report.html"
_T = TypeVar("_T")
_ROWS = 50  # of a table of numbers


def report(run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Writes the page of a run.

    Args:
        run_dir: The folder that was given to the recorder.
        out: The file to write; by default ``report.html`` in that folder.

    Returns:
        The file.

    Raises:
        FileNotFoundError: There are no records.
        ImportError: matplotlib is missing.
    """
    run = Run.read(run_dir)
    target = run.path.parent / FILE_NAME if out is None else Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(as_html(run), encoding="utf-8")
    partial.replace(target)
    return target


def as_html(run: Run) -> str:
    """The page of a run, as text."""
    footer = (
        "Rates, cosines and imbalance on top are means over the last quarter of the records. Of "
        "many records, lines are running medians (of shares, means), with the values in a faint "
        "colour behind them. "
        f"Made by jddist {__version__} from {run.path.name}, on "
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}."
    )
    name = run.path.resolve().parent.name or str(run.path)
    return page(f"Run {name}", _subtitle(run), _tiles(run), _notes(run), _sections(run), footer)


def _subtitle(run: Run) -> str:
    if not run.records:
        return "No step is on record yet."
    last = run.records[-1]
    m = max((group.objectives for group in run.alike[-1].groups), default=0)
    kind = "samples as objectives" if last.per_sample else "objectives"
    parts = [f"{m} {kind}"]
    if run.sessions and run.sessions[-1].method:
        parts.insert(0, run.sessions[-1].method)
    if len(last.groups) > 1:
        parts.append(f"{len(last.groups)} groups of parameters")
    ranks = last.num_ranks
    parts.append(f"{ranks} ranks" if ranks > 1 else "one process")
    parts.append(f"steps {run.records[0].step:,} to {last.step:,}")
    if run.sessions:
        every = run.sessions[-1].every
        parts.append(f"one of {every} steps recorded" if every > 1 else "every step recorded")
    if len(run.sessions) > 1:
        parts.append(f"{len(run.sessions)} sessions")
    return " · ".join(parts)


def _tiles(run: Run) -> list[tuple[str, str]]:
    groups = groups_of(run)
    tiles = [("steps", f"{run.counts['steps']:,}")]
    if not groups:
        return tiles
    for label, name, form in (
        ("pairs of gradients in conflict", "conflict_rate", ".0%"),
        ("gradients against the update", "update_conflict_rate", ".0%"),
        ("cosine of update and mean", "update_mean_cosine", ".2f"),
        ("longest over shortest gradient", "imbalance", ""),
    ):
        values = np.concatenate([latest_mean(list(s.number(name)[:, None])) for s in groups])
        value = float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
        if math.isfinite(value):
            text = format(value, form).replace("%", " %") if form else _number(value)
            tiles.append((label, text))
    shares = [share for record in run.records if (share := record.shares())]
    if shares:
        weighting = float(np.median([share.get("weighting", 0.0) for share in shares]))
        tiles.append(("of a step spent on weights", f"{weighting:.0%}".replace("%", " %")))
    steps = [r.seconds["step"] for r in run.records if "step" in r.seconds]
    if steps:
        tiles.append(("a step takes (median)", _duration(float(np.median(steps)))))
    if run.records[-1].num_ranks > 1:
        sent = float(np.median([record.bytes_sent for record in run.records]))
        tiles.append(("sent by rank 0 per step", _size(sent)))
    return tiles


def _notes(run: Run) -> list[str]:
    notes = []
    counts = run.counts
    if not run.records:
        notes.append(
            "No step is on record yet. The first one is recorded when the recorder watches an "
            "engine or aggregators, and one of them takes a step."
        )
    if counts["skipped"]:
        notes.append(
            f"{_times(counts['skipped'], 'step was', 'steps were')} skipped, since an objective "
            "was NaN or infinite. Look at the data, or lower the learning rate."
        )
    if counts["overflowed"]:
        notes.append(
            f"{_times(counts['overflowed'], 'step', 'steps')} overflowed under the GradScaler, "
            "which skips them and lowers its scale: a few are normal."
        )
    if counts["below_norm_eps"]:
        notes.append(
            f"At {_times(counts['below_norm_eps'], 'call', 'calls')} the Gramian's trace was below "
            "norm_eps, where UPGrad and DualProj ignore conflicts. Give the projector norm_eps=0."
        )
    if counts["fallbacks"]:
        notes.append(
            f"{_times(counts['fallbacks'], 'problem was', 'problems were')} left to quadprog, "
            "since the batched solution was not certified: exact, but slow."
        )
    if run.damaged:
        notes.append(
            f"{_times(run.damaged, 'line', 'lines')} of the records could not be read: a process "
            "was ended while it wrote, or the disk was full."
        )
    if run.records and len(run.alike) < len(run.records):
        notes.append(
            f"The objectives changed during the run: the last {len(run.alike):,} of "
            f"{len(run.records):,} records are drawn."
        )
    return notes


def _sections(run: Run) -> list[tuple[str, list[Card]]]:
    if not run.records:
        return []
    per_sample = run.records[-1].per_sample
    last = "Mean over the last quarter of the records. Blank: zero, or a gradient of length zero."
    over = "Where the pairs lie at each step; below the dashed line they conflict."
    cosine_caption = over if per_sample else last
    weights_caption = (
        "Line: the median over the samples of a step. Bands: the middle half and nine tenths."
        if per_sample
        else "What each gradient is multiplied by before they are added up."
    )
    layers = layers_of(run)
    one_group = len(groups_of(run)) == 1
    conflicts_caption = "Pairs of gradients with a negative inner product, group by group."
    if one_group:
        conflicts_caption = (
            "Pairs of gradients with a negative inner product; and gradients with which the update "
            f"has one (cosine below {CONFLICT:g}): objectives that a small step makes worse. "
            "UPGrad leaves some, by its reg_eps, where lengths differ by orders of magnitude."
        )
    text = {
        "weights": ("Weights", weights_caption),
        "task_weights": ("Weights of tasks", "For each task the sum over its samples' weights."),
        "cosines": ("Cosine similarity of gradients", cosine_caption),
        "task_cosines": ("Cosine similarity of tasks", f"Of the tasks' mean gradients. {last}"),
        "layer_cosines": ("Cosine similarity by layer", cosine_caption),
        "conflicts": ("Conflicts", conflicts_caption),
        "layer_conflicts": ("Conflicts by layer", "Pairs of gradients that conflict in the layer."),
        "norms": ("Lengths of gradients", "Of each objective, before weighting."),
        "task_norms": ("Lengths of the tasks' gradients", "Of the mean over the samples."),
        "imbalance": (
            "Imbalance",
            "The longest gradient over the shortest. Far from 1, the mean follows the longest.",
        ),
        "update_and_mean": (
            "Update against the mean gradient",
            "1: the step goes where the plain mean of the losses would go.",
        ),
        "time_shares": (
            "Where the time goes",
            "Up to the Gramian (exchange included), the weights, the weighted gradient within "
            "jddist's call, and all the rest: forward, optimizer, data.",
        ),
    }
    tables = _tables(run, layers)
    sections = {
        "Weights": ("weights", "task_weights", "update_and_mean"),
        "Conflict": ("conflicts", "cosines", "task_cosines"),
        "Lengths": ("norms", "task_norms", "imbalance"),
        "Layers": ("layer_cosines", "layer_conflicts"),
        "Cost": ("time_shares",),
    }
    found = []
    for heading, names in sections.items():
        cards = []
        for name in names:
            figure = plots.ALL[name](run, PAGE_THEME)
            if figure is None:
                continue
            title, caption = text[name]
            table = tables.get(name)
            description = _in_words(table) or caption
            svg = inline_svg(figure, name, title, description)
            cards.append(Card(title, caption, svg, table))
        found.append((heading, cards))
    return found


def _tables(run: Run, layers: Sequence[Series]) -> dict[str, Table]:
    groups, tasks = groups_of(run), tasks_of(run)
    found: dict[str, Table | None] = {}
    for prefix, series in (("", groups), ("task_", tasks)):
        if len(series) == 1:
            found[f"{prefix}weights"] = _of_objectives(series[0], "weights")
            found[f"{prefix}norms"] = _of_objectives(series[0], "norms")
            found[f"{prefix}cosines"] = _of_cosines(series[0])
    found["conflicts"] = _of_numbers(
        groups, {"conflict_rate": "pairs", "update_conflict_rate": "with the update"}
    )
    found["imbalance"] = _of_numbers(groups, {"imbalance": "imbalance"})
    found["update_and_mean"] = _of_numbers(groups, {"update_mean_cosine": "cosine"})
    found["layer_conflicts"] = _of_numbers(layers, {"conflict_rate": "conflicts"})
    records = [record for record in run.records if record.shares()]
    if records:
        names = ["gramian", "weighting", "gradient"]
        found["time_shares"] = Table(
            ["step", *names],
            [
                [f"{r.step:,}", *(f"{r.shares().get(name, 0):.1%}" for name in names)]
                for r in _some(records)
            ],
        )
    return {name: table for name, table in found.items() if table is not None}


def _of_objectives(series: Series, name: str) -> Table | None:
    values, head = series.values(name), list(series.names)
    if values is None:
        values, head = series.quantiles(name), [f"{100 * q:g} %" for q in QUANTILES]
    if values is None:
        return None
    rows = _some(list(zip(series.steps, values, strict=True)))
    return Table(["step", *head], [[f"{step:,.0f}", *map(_number, row)] for step, row in rows])


def _of_numbers(groups: Sequence[Series], names: dict[str, str]) -> Table | None:
    if not groups:
        return None
    columns = {
        f"{series.name}: {label}" if series.name else label: series.number(name)
        for series in groups
        for name, label in names.items()
    }
    rows = _some(list(zip(groups[0].steps, *columns.values(), strict=True)))
    return Table(["step", *columns], [[f"{row[0]:,.0f}", *map(_number, row[1:])] for row in rows])


def _of_cosines(series: Series) -> Table | None:
    values = series.values("cosines")
    if values is None or len(values[0]) > 24:
        quantiles = series.quantiles("cosines")
        return None if quantiles is None else _of_objectives(series, "cosines")
    mean = latest_mean(list(values))
    rows = [
        [name, *map(_number, row)] for name, row in zip(series.names, mean.tolist(), strict=True)
    ]
    return Table(["", *series.names], rows)


def _in_words(table: Table | None) -> str:
    """A short description of a table for those who do not see the figure."""
    if table is None or not table.rows:
        return ""
    first, last = table.rows[0], table.rows[-1]
    if table.head[0] != "step":
        return f"A matrix of {len(table.rows)} rows; its numbers are in the table below."

    def told(row: Sequence[str]) -> str:
        cells = [f"{name} {cell}" for name, cell in zip(table.head[1:9], row[1:9], strict=True)]
        return ", ".join(cells)

    begin = f"At step {first[0]}: {told(first)}."
    if len(table.rows) == 1:
        return begin
    return f"{begin} At step {last[0]}: {told(last)}. More numbers are in the table below."


def _some(rows: Sequence[_T]) -> list[_T]:
    """Evenly spaced ones of many rows, the first and the last among them."""
    if len(rows) <= _ROWS:
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, _ROWS).round().astype(int)]


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _times(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
