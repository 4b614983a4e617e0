"""Figures of a run: ``plots.weights(Run.read(folder)).savefig("weights.png")``.

Each function returns a matplotlib Figure of its own (no window, no global state), or None if the
run has nothing to draw there. With several groups of parameters there is a panel for each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ._drawing import (
    Axes,
    Figure,
    Theme,
    as_percentages,
    bands,
    heat_of_cosines,
    heat_of_histograms,
    heat_over_steps,
    lines,
    new_figure,
    over_steps,
    style,
)
from ._series import Series, groups_of, latest_mean, layers_of, tasks_of, thinned
from .run import Run

# Of more groups or layers, these many are shown as panels: the first and the last ones.
MOST_PANELS = 12
_LIGHT = Theme()


def weights(run: Run, theme: Theme = _LIGHT) -> Figure | None:
    """The weights of the tasks over the steps, or their distribution over the samples."""
    return _per_objective(groups_of(run), "weights", "weight", theme)


def task_weights(run: Run, theme: Theme = _LIGHT) -> Figure | None:
    """Of objectives that are samples x tasks, the sum of each task's weights."""
    return _per_objective(tasks_of(run), "weights", "weight of a task", theme)


def norms(run: Run, theme: Theme = _LIGHT) -> Figure | None:
    """The lengths of the gradients over the steps."""
    return _per_objective(groups_of(run), "norms", "length of a gradient", theme, log=True)


def task_norms(run: Run, theme: Theme = _LIGHT) -> Figure | None:
    """Of objectives that are samples x tasks, the lengths of the tasks' mean gradients."""
    return _per_objective(tasks_of(run), "norms", "length of a gradient", theme, log=True)


def imbalance(run: Run, theme: Theme = _LIGHT) -> Figure | None:
    """The longest gradient's length over the shortest's."""
    return _numbers(groups_of(run), "imbalance", "longest / shortest", theme, log=True)


def update_and_mean(run: Run, theme: Theme = _LIGHT) -> Figure | None:
    """The cosine similarity of the update with the mean gradient."""
    return _numbers(groups_of(run), "update_mean_cosine", "cosine similarity", theme)


def conflicts(run: Run, theme: Theme = _LIGHT) -> Figure | None:
    """The share of pairs of gradients in conflict, and of gradients that the update is against."""
    groups = groups_of(run)
    if len(groups) > 1:
        return _numbers(groups, "conflict_rate", "conflicting pairs", theme, share=True)
    drawn = groups[:1]
    values = [s.number(n) for s in drawn for n in ("conflict_rate", "update_conflict_rate")]
    if not any(np.isfinite(v).any() for v in values):
        return None
    with style(theme):
        figure, (axes,) = new_figure()
        names = ["pairs of gradients", "update and a gradient"]
        lines(axes, drawn[0].steps, np.stack(values, axis=1), names, theme, shares=True)
        as_percentages(axes)
        axes.set_ylabel("in conflict")
    return figure


def cosines(run: Run, theme: Theme = _LIGHT) -> Figure | None:
    """Cosine similarities of the gradients with respect to all parameters.

    A heat map of the means over the last quarter of the records; for samples, which are others in
    each step, the distribution over pairs at each step.
    """
    groups = groups_of(run)
    return _cosines(groups[:1], theme) if len(groups) == 1 else None


def task_cosines(run: Run, theme: Theme = _LIGHT) -> Figure | None:
    """Of objectives that are samples x tasks, the cosine similarities of the mean gradients."""
    return _cosines(tasks_of(run), theme)


def layer_cosines(run: Run, theme: Theme = _LIGHT) -> Figure | None:
    """``cosines`` for each layer, or each group of parameters, in a panel of its own."""
    layers, omitted = _panels(layers_of(run))
    square = bool(layers) and layers[0].values("cosines") is not None
    if not layers or not (square or layers[0].histograms() is not None):
        return None
    with style(theme):
        columns = min(len(layers), 3 if square and len(layers) not in (2, 4) else 2)
        rows = -(-len(layers) // columns)
        each = {1: 3.4, 2: 2.0, 3: 1.45}[columns] if square else 1.9
        figure, all_axes = new_figure(rows, columns, 0.2 + rows * each)
        image = None
        for axes, layer in zip(all_axes, layers, strict=False):
            axes.set_title(layer.name, fontsize=8.5)
            values = layer.values("cosines")
            if values is not None:
                mean = latest_mean(list(values))
                image = heat_of_cosines(axes, mean, layer.names, theme, numbers=False)
                axes.set_xticks([])
                axes.set_yticks([])
            else:
                counts = layer.histograms()
                assert counts is not None
                heat_of_histograms(axes, layer.steps, counts, theme, bar=False)
                axes.set_ylabel("")
                axes.label_outer()
        for axes in all_axes[len(layers) :]:
            axes.set_axis_off()
        if image is not None:
            _bar(figure, image, all_axes)
        if omitted:
            figure.supxlabel(f"and {omitted} layers in between", fontsize=8.5)
    return figure


def layer_conflicts(run: Run, theme: Theme = _LIGHT) -> Figure | None:
    """The share of conflicting pairs of gradients, layer by layer over the steps."""
    layers, _ = _panels(layers_of(run))
    values = [layer.number("conflict_rate") for layer in layers]
    if not any(np.isfinite(v).any() for v in values):
        return None
    with style(theme):
        figure, (axes,) = new_figure(height=1.1 + 0.24 * max(4, len(layers)))
        names = [layer.name for layer in layers]
        stacked = np.stack(values, axis=1)
        heat_over_steps(
            axes, layers[0].steps, stacked, names, theme, label="conflicting pairs", most=1.0
        )
        axes.set_ylabel("layer")
    return figure


def time_shares(run: Run, theme: Theme = _LIGHT) -> Figure | None:
    """What the duration of a step is made of."""
    records = [record for record in run.records if record.shares()]
    if not records:
        return None
    names = ["gramian", "weighting", "gradient"]
    labels = ["Gramian", "weights", "gradient", "the rest"]
    steps = np.array([record.step for record in records], dtype=float)
    shares = np.array([[r.shares().get(name, 0.0) for name in names] for r in records])
    shares = np.concatenate([shares, np.clip(1 - shares.sum(axis=1, keepdims=True), 0, 1)], axis=1)
    xs, ys = thinned(steps, shares, 48)
    if len(xs) == 1:
        xs, ys = np.array([xs[0] - 0.5, xs[0] + 0.5]), np.repeat(ys, 2, axis=0)
    with style(theme):
        figure, (axes,) = new_figure()
        colours = [*theme.series[:3], theme.grid]
        axes.stackplot(xs, ys.T, labels=labels, colors=colours, alpha=0.9, linewidth=0)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, columnspacing=1.0)
        axes.set_ylim(0, 1)
        as_percentages(axes)
        axes.set_ylim(0, 1)
        axes.set_ylabel("share of a step")
        over_steps(axes, xs)
    return figure


def _per_objective(
    groups: Sequence[Series], name: str, label: str, theme: Theme, *, log: bool = False
) -> Figure | None:
    shown, omitted = _panels(
        [g for g in groups if g.values(name) is not None or g.quantiles(name) is not None]
    )
    if not shown:
        return None

    def draw(axes: Axes, series: Series) -> None:
        quantiles, values = series.quantiles(name), series.values(name)
        if quantiles is not None:
            bands(axes, series.steps, quantiles, theme, log=log)
            axes.set_ylabel(label)
        elif values is not None and values.shape[1] > len(theme.series):
            heat_over_steps(axes, series.steps, values, series.names, theme, label=label, log=log)
        elif values is not None:
            lines(axes, series.steps, values, series.names, theme, log=log)
            axes.set_ylabel(label)

    values = shown[0].values(name)
    rows = values.shape[1] if values is not None and values.shape[1] > len(theme.series) else 0
    return _drawn(shown, omitted, draw, theme, height=max(2.7, 0.9 + 0.19 * min(rows, 64)))


def _numbers(
    groups: Sequence[Series],
    name: str,
    label: str,
    theme: Theme,
    *,
    log: bool = False,
    share: bool = False,
) -> Figure | None:
    values = [series.number(name) for series in groups]
    if not any(np.isfinite(v).any() for v in values):
        return None
    stacked, names = np.stack(values, axis=1), [series.name for series in groups]
    with style(theme):
        if len(groups) > len(theme.series):
            shown, _ = _panels(groups)
            stacked = np.stack([series.number(name) for series in shown], axis=1)
            figure, (axes,) = new_figure(height=1.1 + 0.24 * len(shown))
            titles = [series.name for series in shown]
            heat_over_steps(axes, groups[0].steps, stacked, titles, theme, label=label, log=log)
            return figure
        figure, (axes,) = new_figure()
        lines(axes, groups[0].steps, stacked, names, theme, log=log, shares=share)
        if share:
            as_percentages(axes)
        axes.set_ylabel(label)
    return figure


def _cosines(groups: Sequence[Series], theme: Theme) -> Figure | None:
    if not groups:
        return None
    series = groups[0]
    values, counts = series.values("cosines"), series.histograms()
    with style(theme):
        if values is not None and values.shape[1] > 1:
            figure, (axes,) = new_figure(height=4.1)
            mean = latest_mean(list(values))
            numbers = len(mean) <= 12
            image = heat_of_cosines(axes, mean, series.names, theme, numbers=numbers)
            _bar(figure, image, [axes])
            return figure
        if counts is not None:
            figure, (axes,) = new_figure(height=3.0)
            heat_of_histograms(axes, series.steps, counts, theme)
            return figure
    return None


def _bar(figure: Figure, image: object, axes: list[Axes]) -> None:
    bar = figure.colorbar(image, ax=axes, label="cosine similarity", pad=0.02, shrink=0.8)  # type: ignore[arg-type]
    bar.outline.set_visible(False)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1])


def _panels(series: Sequence[Series]) -> tuple[list[Series], int]:
    """The series to show, and how many are left out."""
    if len(series) <= MOST_PANELS:
        return list(series), 0
    half = MOST_PANELS // 2
    return [*series[:half], *series[-half:]], len(series) - 2 * half


def _drawn(
    shown: Sequence[Series],
    omitted: int,
    draw: Callable[[Axes, Series], None],
    theme: Theme,
    *,
    height: float,
) -> Figure:
    with style(theme):
        figure, all_axes = new_figure(
            len(shown), 1, height if len(shown) == 1 else 2.1 * len(shown)
        )
        for index, (axes, series) in enumerate(zip(all_axes, shown, strict=True)):
            draw(axes, series)
            legend = axes.get_legend()
            if series.name:
                axes.set_ylabel(f"{series.name}: {axes.get_ylabel()}")
            if legend is not None and index > 0:
                legend.remove()
            if index < len(shown) - 1:
                axes.set_xlabel("")
        if omitted:
            figure.supxlabel(f"and {omitted} groups in between", fontsize=8.5)
    return figure


ALL: dict[str, Callable[[Run, Theme], Figure | None]] = {
    "weights": weights,
    "task_weights": task_weights,
    "cosines": cosines,
    "task_cosines": task_cosines,
    "layer_cosines": layer_cosines,
    "conflicts": conflicts,
    "layer_conflicts": layer_conflicts,
    "norms": norms,
    "task_norms": task_norms,
    "imbalance": imbalance,
    "update_and_mean": update_and_mean,
    "time_shares": time_shares,
}
"""Every figure by name."""


def save_all(
    run_dir: str | os.PathLike[str], out: str | os.PathLike[str], kind: str = "png"
) -> list[Path]:
    """Writes every figure that a run has to a folder, on a white ground; the files."""
    run, folder = Run.read(run_dir), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in ALL.items():
        figure = draw(run, _LIGHT)
        if figure is not None:
            written.append(folder / f"{name}.{kind}")
            figure.savefig(written[-1], dpi=160, facecolor="white")
    return written


__all__ = ["ALL", "Theme", "save_all", *ALL]
