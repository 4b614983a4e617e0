"""What ``mtl_fsdp.py`` writes and prints: metrics, a table, curves, weights and conflicts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import torch
from _mtl_data import TASKS
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)
from matplotlib.ticker import MaxNLocator  # noqa: E402

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
PAIRS = tuple(combinations(range(len(TASKS)), 2))
TOLERANCE = 1e-8  # between numbers of ranks: rounding of float64, grown over a whole training


@dataclass(frozen=True)
class Epoch:
    """Measurements after one epoch: one line of ``metrics.jsonl``. Lists have one entry per task.

    Attributes:
        method: How the tasks were aggregated.
        ranks: On how many ranks.
        seed: Of the initialisation and of the order of the pairs.
        epoch: Counted from 1.
        train_loss: The mean losses on all training pairs.
        test_loss: The same on the test pairs.
        test_error: The shares of test pairs that are wrong.
        seconds: The duration of the epoch, without the measurements.
    """

    method: str
    ranks: int
    seed: int
    epoch: int
    train_loss: list[float]
    test_loss: list[float]
    test_error: list[float]
    seconds: float


@dataclass(frozen=True)
class Step:
    """Measurements in one step: one line of ``steps.jsonl``.

    Attributes:
        method: How the tasks were aggregated.
        ranks: On how many ranks.
        seed: Of the initialisation and of the order of the pairs.
        step: Counted from 0.
        weights: Of each task, the mean over groups; empty if the method has none.
        cosines: Between the gradients of the pairs of tasks, on the whole trunk.
    """

    method: str
    ranks: int
    seed: int
    step: int
    weights: list[float]
    cosines: list[float]

    @staticmethod
    def of(
        method: str,
        ranks: int,
        seed: int,
        step: int,
        gramian: Tensor,
        weights: Sequence[Tensor | None],
    ) -> Step:
        known = [w for w in weights if w is not None]
        mean = torch.stack(known).mean(dim=0).tolist() if known else []
        norms = gramian.diagonal().sqrt()
        cosines = gramian / torch.outer(norms, norms)
        return Step(method, ranks, seed, step, mean, [float(cosines[i, j]) for i, j in PAIRS])


class Report:
    """Collects results, and writes them to ``folder`` if this rank is the one that writes."""

    def __init__(self, folder: Path, grouping: str, *, writes: bool) -> None:
        self.folder = folder
        self.epochs: list[Epoch] = []
        self.steps: list[Step] = []
        self._grouping = grouping
        self._writes = writes
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "steps.jsonl"):
                (folder / name).write_text("")

    def add(self, epochs: Sequence[Epoch], steps: Sequence[Step]) -> None:
        self.epochs.extend(epochs)
        self.steps.extend(steps)
        if self._writes:
            for name, records in (("metrics.jsonl", epochs), ("steps.jsonl", steps)):
                with (self.folder / name).open("a") as file:
                    file.writelines(json.dumps(asdict(record)) + "\n" for record in records)

    def print_table(self) -> None:
        print(f"\naggregated {self._grouping}\n{table(self.epochs, self.steps)}", flush=True)

    def plot(self) -> None:
        _plot_curves(self.epochs, self._grouping, self.folder / "curves.png")
        _plot_steps(self.steps, self._grouping, self.folder / "weights_and_conflicts.png")


def compare(folder: Path, grouping: str, counts: Sequence[int]) -> None:
    """One table for several numbers of ranks, and the check that they trained alike."""
    report = Report(folder, grouping, writes=True)
    for count in counts:
        epochs = [Epoch(**x) for x in _read(folder / f"ranks-{count}" / "metrics.jsonl")]
        report.add(epochs, [Step(**x) for x in _read(folder / f"ranks-{count}" / "steps.jsonl")])
    report.print_table()
    report.plot()
    if len(counts) < 2:
        return
    curves: dict[int, list[float]] = {}
    for epoch in report.epochs:
        curves.setdefault(epoch.ranks, []).extend([*epoch.train_loss, *epoch.test_loss])
    for step in report.steps:
        curves[step.ranks].extend(step.weights)
    first, *others = curves.values()
    largest = max(abs(a - b) for other in others for a, b in zip(first, other, strict=True))
    print(f"the losses and weights of {sorted(curves)} ranks differ by at most {largest:.1e}")
    if not largest <= TOLERANCE:  # false for NaN too
        raise SystemExit("they should not depend on the number of ranks")


def table(epochs: Sequence[Epoch], steps: Sequence[Step]) -> str:
    """One row per method, number of ranks and task, with standard errors over seeds."""
    lines = [
        "| method | ranks | task | training loss | test error | mean weight | conflicts with "
        "another task | epoch time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (method, ranks), runs in _runs(epochs).items():
        seconds = statistics.median(e.seconds for run in runs for e in run)
        own = [s for s in steps if (s.method, s.ranks) == (method, ranks)]
        for i, task in enumerate(TASKS):
            conflicts = [any(s.cosines[k] < 0 for k, p in enumerate(PAIRS) if i in p) for s in own]
            weights = [s.weights[i] for s in own if s.weights]
            weight = f"{statistics.fmean(weights):.3f}" if weights else ""
            lines.append(
                f"| {method} | {ranks} | {task} "
                f"| {_with_error([run[-1].train_loss[i] for run in runs], 4)} "
                f"| {_with_error([100 * run[-1].test_error[i] for run in runs], 1)} % "
                f"| {weight} | {100 * statistics.fmean(conflicts):.0f} % of steps "
                f"| {seconds:.1f} s |"
            )
    return "\n".join(lines)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _runs(epochs: Sequence[Epoch]) -> dict[tuple[str, int], list[list[Epoch]]]:
    runs: dict[tuple[str, int], dict[int, list[Epoch]]] = {}
    for epoch in epochs:
        runs.setdefault((epoch.method, epoch.ranks), {}).setdefault(epoch.seed, []).append(epoch)
    return {key: list(by_seed.values()) for key, by_seed in runs.items()}


def _with_error(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def _plot_curves(epochs: Sequence[Epoch], grouping: str, path: Path) -> None:
    figure, all_axes = plt.subplots(1, len(TASKS), figsize=(13, 4.2), layout="constrained")
    counts = sorted({epoch.ranks for epoch in epochs})
    for i, (task, axes) in enumerate(zip(TASKS, all_axes, strict=True)):
        methods = list(dict.fromkeys(epoch.method for epoch in epochs))
        for (method, ranks), runs in _runs(epochs).items():
            # The same curve for every number of ranks, which `compare` checks: one as a line, the
            # others as marks on it.
            style = "-" if ranks == counts[0] else ""
            mark = "" if ranks == counts[0] else ("o", "x", "+")[(counts.index(ranks) - 1) % 3]
            ys = [
                statistics.fmean(e.train_loss[i] for e in column)
                for column in zip(*runs, strict=True)
            ]
            axes.plot(
                range(1, len(ys) + 1),
                ys,
                linestyle=style,
                marker=mark,
                markersize=4 + 3 * counts.index(ranks),
                fillstyle="none",
                color=COLOURS[methods.index(method) % len(COLOURS)],
                label=f"{method}, {ranks} rank{'s' if ranks > 1 else ''}",
                linewidth=1.6,
            )
        axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title({"left": "left digit", "right": "right digit", "sum": "sum of both"}[task])
        axes.grid(alpha=0.3, which="both")
    all_axes[0].set_ylabel("training loss")
    all_axes[-1].legend(fontsize=8)
    seeds = len({epoch.seed for epoch in epochs})
    figure.suptitle(f"aggregated {grouping}, mean over {seeds} seed{'s' if seeds > 1 else ''}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_steps(steps: Sequence[Step], grouping: str, path: Path) -> None:
    """Weights above, cosines below, one column per method; of one number of ranks and one seed."""
    ranks = max(step.ranks for step in steps)
    methods = list(dict.fromkeys(step.method for step in steps))
    figure, axes = plt.subplots(
        2,
        len(methods),
        figsize=(1.5 + 4.6 * len(methods), 6.4),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey="row",
    )
    for column, method in enumerate(methods):
        own = [s for s in steps if (s.method, s.ranks, s.seed) == (method, ranks, 0)]
        above, below = axes[0][column], axes[1][column]
        if own[0].weights:
            for i, task in enumerate(TASKS):
                _draw(above, [s.weights[i] for s in own], COLOURS[i], task)
        else:
            above.text(0.5, 0.5, "no weights", ha="center", transform=above.transAxes)
        for k, (i, j) in enumerate(PAIRS):
            _draw(below, [s.cosines[k] for s in own], COLOURS[3 + k], f"{TASKS[i]} and {TASKS[j]}")
        low, high = below.get_ylim()
        below.axhspan(min(low, -0.05), 0, color="#000000", alpha=0.07)
        below.set_ylim(min(low, -0.05), high)
        above.set_title(method)
        below.set_xlabel("step")
        for one in (above, below):
            one.grid(alpha=0.3)
    axes[0][0].set_ylabel("weight of the task")
    axes[1][0].set_ylabel("cosine of two tasks' gradients\n(shaded: conflict)")
    if any(step.weights for step in steps):
        weighted = next(m for m, s in ((s.method, s) for s in steps) if s.weights)
        axes[0][methods.index(weighted)].legend(fontsize=8)
    axes[1][-1].legend(fontsize=8)
    figure.suptitle(
        f"aggregated {grouping}, {ranks} rank{'s' if ranks > 1 else ''}, seed 0 "
        "(thick: moving average)"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(axes: Any, values: Sequence[float], colour: str, label: str) -> None:
    series = torch.tensor(values, dtype=torch.float64)
    width = max(1, len(values) // 20)
    axes.plot(range(len(values)), values, color=colour, alpha=0.25, linewidth=0.8)
    smooth = series.unfold(0, width, 1).mean(dim=1)
    start = (width - 1) // 2
    axes.plot(range(start, start + len(smooth)), smooth, color=colour, label=label, linewidth=1.8)
