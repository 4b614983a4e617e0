"""What ``digits.py`` writes and prints: metrics, a table, loss curves, a heat map."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)
from matplotlib.ticker import MaxNLocator  # noqa: E402

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"mean": "#000000", "upgrad": "#0072B2", "local-upgrad": "#D55E00"}
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Epoch:
    """Measurements after one epoch: one line of ``metrics.jsonl``.

    Attributes:
        method: How it was trained.
        ranks: On how many ranks.
        seed: Of the initialisation and of the order of the images.
        lr: The learning rate.
        epoch: Counted from 1.
        train_loss: The mean loss on all training images.
        test_accuracy: The share of test images classified rightly.
        seconds: The duration of the epoch, without the measurements.
    """

    method: str
    ranks: int
    seed: int
    lr: float
    epoch: int
    train_loss: float
    test_accuracy: float
    seconds: float


class Report:
    """Collects epochs, and writes them to ``folder`` if this rank is the one that writes."""

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self.folder = folder
        self.epochs: list[Epoch] = []
        self._writes = writes
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").write_text("")

    def add(self, epochs: Sequence[Epoch]) -> None:
        self.epochs.extend(epochs)
        if self._writes:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.writelines(json.dumps(asdict(epoch)) + "\n" for epoch in epochs)

    def print_table(self) -> None:
        print(f"\n{table(self.epochs)}", flush=True)

    def plot_curves(self) -> None:
        _plot(self.epochs, self.folder / "loss_curves.png")


def read_metrics(path: Path) -> list[Epoch]:
    return [Epoch(**json.loads(line)) for line in path.read_text().splitlines()]


def table(epochs: Sequence[Epoch]) -> str:
    """One row per method and number of ranks, with standard errors over seeds."""
    header = "| method | ranks | learning rate | area under training loss | final training loss "
    lines = [header + "| test accuracy | epoch time / mean's |", "|---|---|---|---|---|---|---|"]
    times: dict[tuple[str, int], float] = {}
    for key, runs in _by_method(epochs).items():
        times[key] = statistics.median(e.seconds for run in runs for e in run)
    for (method, ranks), runs in _by_method(epochs).items():
        areas = [statistics.fmean(e.train_loss for e in run) for run in runs]
        base = times.get(("mean", ranks))
        ratio = "" if base is None else f"{times[method, ranks] / base:.1f}"
        lines.append(
            f"| {method} | {ranks} | {runs[0][0].lr:g} | {_with_error(areas)} "
            f"| {_with_error([run[-1].train_loss for run in runs])} "
            f"| {_with_error([100 * run[-1].test_accuracy for run in runs], 1)} % | {ratio} |"
        )
    return "\n".join(lines)


def write_heat_map(folder: Path, gramian: Tensor, labels: Sequence[int]) -> None:
    """Cosine similarities between the gradients of one batch, ordered by label."""
    norms = gramian.diagonal().sqrt()
    cosines = gramian / torch.outer(norms, norms)
    figure, axes = plt.subplots(figsize=(7, 6), layout="constrained")
    image = axes.imshow(cosines, cmap="RdBu", vmin=-1, vmax=1)
    figure.colorbar(image, label="cosine similarity of two gradients")
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_xlabel("label of the sample")
    axes.set_ylabel("label of the sample")
    conflicting = float((cosines < 0).double().mean())
    axes.set_title(f"One batch before training: {100 * conflicting:.0f} % of pairs conflict")
    figure.savefig(folder / "gramian.png", dpi=130)
    plt.close(figure)


def _by_method(epochs: Sequence[Epoch]) -> dict[tuple[str, int], list[list[Epoch]]]:
    runs: dict[tuple[str, int], dict[int, list[Epoch]]] = {}
    for epoch in epochs:
        runs.setdefault((epoch.method, epoch.ranks), {}).setdefault(epoch.seed, []).append(epoch)
    return {key: list(by_seed.values()) for key, by_seed in runs.items()}


def _with_error(values: Sequence[float], digits: int = 3) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def _plot(epochs: Sequence[Epoch], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    counts = sorted({epoch.ranks for epoch in epochs})
    for (method, ranks), runs in _by_method(epochs).items():
        label = f"{method}, {ranks} rank{'s' if ranks > 1 else ''}"
        if len(counts) > 1 and method != "local-upgrad":
            # The same curve for every number of ranks, which `compare` checks: draw it once.
            if ranks != counts[0]:
                continue
            label = f"{method}, {', '.join(map(str, counts))} ranks"
        elif len(counts) > 1 and ranks == 1:
            continue  # on one rank, local is global
        xs = [epoch.epoch for epoch in runs[0]]
        ys = [statistics.fmean(column) for column in zip(*_losses(runs), strict=True)]
        style = STYLES[counts.index(ranks) % len(STYLES)]
        axes.plot(xs, ys, style, color=COLOURS[method], label=label, linewidth=1.8)
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("training loss (mean over 1,024 images)")
    seeds = len({epoch.seed for epoch in epochs})
    axes.set_title(f"Digits, mean over {seeds} seed{'s' if seeds > 1 else ''}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _losses(runs: Sequence[Sequence[Epoch]]) -> list[list[float]]:
    return [[epoch.train_loss for epoch in run] for run in runs]
