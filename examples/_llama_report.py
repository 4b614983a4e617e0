"""What ``llama_iwrm_fsdp.py`` writes and prints: runs, a table, curves."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"mean": "#000000", "upgrad": "#0072B2"}
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Run:
    """One training: one line of ``metrics.jsonl``. Losses are in nats per character.

    Attributes:
        method: How the sequences' losses were weighed.
        ranks: On how many ranks.
        lr: The learning rate.
        seed: Of the initialisation and of the order of the sequences.
        losses: The mean loss of each step's sequences, before the step.
        conflicts: The share of pairs of each step's sequences whose gradients conflict.
        validation: The loss of each validation sequence, after the last step.
        seconds: The duration of a step.
    """

    method: str
    ranks: int
    lr: float
    seed: int
    losses: list[float]
    conflicts: list[float]
    validation: list[float]
    seconds: float

    @property
    def worst(self) -> float:
        """The mean loss of the tenth of the validation sequences with the largest losses."""
        ordered = sorted(self.validation, reverse=True)
        return statistics.fmean(ordered[: max(1, len(ordered) // 10)])


class Report:
    """Collects runs, and writes them to ``folder`` if this rank is the one that writes."""

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self.folder = folder
        self.runs: list[Run] = []
        self._writes = writes
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").write_text("")

    def add(self, run: Run) -> None:
        self.runs.append(run)
        if self._writes:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")

    def print_table(self) -> None:
        print(f"\n{table(self.runs)}", flush=True)

    def plot(self) -> None:
        _plot(self.runs, self.folder / "curves.png")


def table(runs: Sequence[Run]) -> str:
    """One row per method and learning rate, with standard errors over seeds."""
    lines = [
        "| method | ranks | learning rate | mean training loss | validation loss "
        "| its worst tenth | pairs in conflict | step time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (method, lr), own in _by_method(runs).items():
        seconds = statistics.median(run.seconds for run in own)
        lines.append(
            f"| {method} | {own[0].ranks} | {lr:g} "
            f"| {_with_error([statistics.fmean(run.losses) for run in own])} "
            f"| {_with_error([statistics.fmean(run.validation) for run in own])} "
            f"| {_with_error([run.worst for run in own])} "
            f"| {100 * statistics.fmean(c for run in own for c in run.conflicts):.0f} % "
            f"| {1000 * seconds:.0f} ms |"
        )
    return "\n".join(lines)


def _by_method(runs: Sequence[Run]) -> dict[tuple[str, float], list[Run]]:
    found: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        found.setdefault((run.method, run.lr), []).append(run)
    return found


def _with_error(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def _plot(runs: Sequence[Run], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    rates = sorted({run.lr for run in runs}, reverse=True)
    for (method, lr), own in _by_method(runs).items():
        for axes, series in ((left, "losses"), (right, "conflicts")):
            columns = zip(*(getattr(run, series) for run in own), strict=True)
            _draw(
                axes,
                [statistics.fmean(column) for column in columns],
                linestyle=STYLES[rates.index(lr) % len(STYLES)],
                color=COLOURS[method],
                label=f"{method}, learning rate {lr:g}",
            )
    left.set_ylabel("training loss (nats per character)")
    right.set_ylabel("share of pairs of sequences in conflict")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    left.legend()
    seeds = len({run.seed for run in runs})
    count = runs[0].ranks
    figure.suptitle(
        f"Llama on docstrings, {count} rank{'s' if count > 1 else ''}, "
        f"mean over {seeds} seed{'s' if seeds > 1 else ''} (moving averages over 10 steps)"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(axes: Any, values: Sequence[float], **style: str) -> None:
    width = min(10, len(values))
    sums = [0.0, *accumulate(values)]
    means = [(sums[i + width] - sums[i]) / width for i in range(len(values) - width + 1)]
    axes.plot(range(width - 1, len(values)), means, linewidth=1.6, **style)
