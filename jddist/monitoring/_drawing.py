"""Drawing by matplotlib: a theme, and the few kinds of axes that the figures are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._series import MEDIAN, smoothed, thinned
from .statistics import Array

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, to_rgb
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as missing:
    raise ImportError(
        "Found no matplotlib, which the figures are drawn with; expected it to be installed. "
        'Run: pip install "jddist[monitoring]"'
    ) from missing


@dataclass(frozen=True)
class Theme:
    """The colours of a figure.

    Attributes:
        ink: Text.
        muted: Axes and ticks.
        grid: Grid lines.
        series: Of lines, in this order; told apart by readers with any kind of colour vision.
        positive: The colour of +1 in heat maps. What is near 0 lets the background through, so that
            heat maps suit light and dark pages.
        negative: The colour of -1.
    """

    ink: str = "#1b1e24"
    muted: str = "#5b626e"
    grid: str = "#d9dce2"
    series: tuple[str, ...] = ("#0072b2", "#c24e00", "#00806a", "#a5478a", "#8a6d00", "#4f5d75")
    positive: str = "#1f77c9"
    negative: str = "#d95f02"


STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), "-")
WIDTH = 4.8  # inches: as wide as a phone, so that the text is neither small there nor large


@contextmanager
def style(theme: Theme) -> Iterator[None]:
    """The defaults of matplotlib within this context."""
    settings: Any = {
        "font.size": 9.5,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.labelcolor": theme.muted,
        "axes.labelsize": 9,
        "axes.edgecolor": theme.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.7,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "text.color": theme.ink,
        "axes.titlecolor": theme.ink,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "svg.fonttype": "none",
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(rows: int = 1, columns: int = 1, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.reshape(-1))


def over_steps(axes: Axes, steps: Array) -> None:
    """Labels the x axis with steps, also where there is one only."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len(steps) and steps[0] == steps[-1]:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def as_percentages(axes: Axes) -> None:
    """Labels the y axis, from 0 to 1, in per cent."""
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    low, high = axes.get_ylim()
    axes.set_ylim(max(-0.02, min(0.0, low)), min(1.02, max(high, 0.1)))


def lines(
    axes: Axes,
    steps: Array,
    values: Array,
    names: Sequence[str],
    theme: Theme,
    *,
    log: bool = False,
    shares: bool = False,
) -> None:
    """One line for each column [T, m], of at most as many as there are colours.

    Of many steps, the line is a running median (of ``shares``, a running mean), before the values
    themselves in a faint colour.
    """
    xs, ys = thinned(steps, values)
    marker = "o" if len(xs) < 3 else None
    drawn = ys
    if len(xs) >= 60:
        drawn = smoothed(ys, len(xs) // 20, means=shares)
        for i in range(len(names)):
            axes.plot(xs, ys[:, i], color=theme.series[i % len(theme.series)], lw=0.7, alpha=0.3)
    for i, name in enumerate(names):
        axes.plot(
            xs,
            drawn[:, i],
            linestyle=STYLES[i % len(STYLES)],
            color=theme.series[i % len(theme.series)],
            label=name,
            linewidth=1.6,
            marker=marker,
            markersize=4,
        )
    _scale(axes, ys, log)
    if len(names) > 1:
        columns = 4 if sum(map(len, names)) + 6 * len(names) <= 48 else 2
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2)
    over_steps(axes, steps)


def bands(axes: Axes, steps: Array, quantiles: Array, theme: Theme, *, log: bool = False) -> None:
    """The median as a line, and the middle half and the middle nine tenths as bands: [T, 7]."""
    xs, ys = thinned(steps, quantiles)
    colour = theme.series[0]
    for low, high, alpha, label in ((1, 5, 0.16, "5 to 95 %"), (2, 4, 0.30, "25 to 75 %")):
        axes.fill_between(
            xs, ys[:, low], ys[:, high], color=colour, alpha=alpha, label=label, linewidth=0
        )
    marker = "o" if len(xs) < 3 else None
    axes.plot(xs, ys[:, MEDIAN], color=colour, label="median", linewidth=1.6, marker=marker)
    _scale(axes, ys[:, 1:6], log)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2)
    over_steps(axes, steps)


def heat_over_steps(
    axes: Axes,
    steps: Array,
    values: Array,
    names: Sequence[str],
    theme: Theme,
    *,
    label: str,
    most: float | None = None,
    log: bool = False,
) -> None:
    """One row for each column of [T, m], coloured by value from 0 (or the least, if ``log``)."""
    xs, ys = thinned(steps, values)
    finite = ys[np.isfinite(ys) & (ys > 0)]
    low, high = (float(np.quantile(finite, q)) if len(finite) else 1.0 for q in (0.02, 0.995))
    top = high if most is None else most
    norm: Normalize = Normalize(0.0, top or 1.0)
    if log and low > 0 and high / low > 20:
        norm = LogNorm(low, high)
    mesh = axes.pcolormesh(
        _edges(xs),
        np.arange(len(names) + 1),
        ys.T,
        cmap=_one_hue(theme.positive),
        norm=norm,
        rasterized=True,
    )
    bar = _figure(axes).colorbar(mesh, ax=axes, label=label, pad=0.02)
    bar.outline.set_visible(False)
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.invert_yaxis()
    axes.grid(False)
    over_steps(axes, steps)


def heat_of_histograms(
    axes: Axes, steps: Array, counts: Array, theme: Theme, *, bar: bool = True
) -> None:
    """The distribution of cosines [T, BINS] over the steps."""
    xs, ys = thinned(steps, counts)
    totals = ys.sum(axis=1, keepdims=True)
    shares = ys / np.where(totals == 0, 1.0, totals)
    mesh = axes.pcolormesh(
        _edges(xs),
        np.linspace(-1, 1, shares.shape[1] + 1),
        shares.T,
        cmap=_one_hue(theme.positive),
        vmin=0.0,
        vmax=float(np.quantile(shares, 0.995)) or 1.0,
        rasterized=True,
    )
    if bar:
        drawn = _figure(axes).colorbar(mesh, ax=axes, label="share of pairs", pad=0.02)
        drawn.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        drawn.outline.set_visible(False)
    axes.axhline(0.0, color=theme.muted, linewidth=0.8, linestyle=(0, (3, 2)))
    axes.set_ylabel("cosine similarity")
    axes.grid(False)
    over_steps(axes, steps)


def heat_of_cosines(
    axes: Axes, cosines: Array, names: Sequence[str], theme: Theme, *, numbers: bool
) -> Any:
    """A heat map of [m, m]: -1 in one hue, +1 in another, 0 transparent."""
    m = len(cosines)
    image = axes.pcolormesh(
        np.arange(m + 1), np.arange(m + 1), cosines, cmap=_two_hues(theme), vmin=-1, vmax=1
    )
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.grid(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    some = range(0, m, max(1, -(-m // 16)))
    short = max((len(names[i]) for i in some), default=0) * len(some) <= 36
    axes.set_xticks([i + 0.5 for i in some], [names[i] for i in some], rotation=0 if short else 90)
    axes.set_yticks([i + 0.5 for i in some], [names[i] for i in some])
    if numbers:
        size = 8.5 if m <= 8 else 6.5
        for i in range(m):
            for j in range(i):
                value = cosines[i, j]
                text = "" if np.isnan(value) else f"{value:.2f}".replace("0.", ".")
                axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=size)
    return image


def _scale(axes: Axes, values: Array, log: bool) -> None:
    positive = values[np.isfinite(values) & (values > 0)]
    if log and len(positive) and positive.max() / positive.min() > 20:
        axes.set_yscale("log")


def _edges(centres: Array) -> Array:
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.array([2 * centres[0] - middle[0], *middle, 2 * centres[-1] - middle[-1]])


def _one_hue(colour: str) -> LinearSegmentedColormap:
    r, g, b = to_rgb(colour)
    return LinearSegmentedColormap.from_list("one", [(r, g, b, 0.0), (r, g, b, 1.0)])


def _two_hues(theme: Theme) -> LinearSegmentedColormap:
    low, high = to_rgb(theme.negative), to_rgb(theme.positive)
    stops = [(*low, 1.0), (*low, 0.0), (*high, 0.0), (*high, 1.0)]
    return LinearSegmentedColormap.from_list("two", list(zip((0, 0.5, 0.5, 1), stops, strict=True)))


def _figure(axes: Axes) -> Figure:
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure
