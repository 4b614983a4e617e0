"""Runs ``digits.py`` on several numbers of ranks in turn, and compares what came out."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from _digits_report import COLOURS, Report, read_metrics
from _ranks import torchrun


def relaunch(script: str, args: Namespace) -> None:
    """Runs ``script`` on 1, 2 and ``--nproc`` ranks, and compares the results."""
    counts = sorted({1, 2, args.nproc} if args.nproc > 1 else {1})
    options = ["--method", *args.method, "--seeds", str(args.seeds), "--epochs", str(args.epochs)]
    options += ["--batch-size", str(args.batch_size)]
    if args.lr:
        options += ["--lr", *map(str, args.lr)]
    if args.checkpoint_dir:
        options += ["--checkpoint-every", str(args.checkpoint_every)]
    for count in counts:
        own = ["--out", str(Path(args.out) / f"ranks-{count}")]
        if args.checkpoint_dir:
            own += ["--checkpoint-dir", str(Path(args.checkpoint_dir) / f"ranks-{count}")]
        if args.monitoring:
            own += ["--monitoring", str(Path(args.monitoring) / f"ranks-{count}")]
            own += ["--monitoring-every", str(args.monitoring_every)]
        torchrun(script, count, [*options, *own])
    compare(Path(args.out), counts)


def compare(folder: Path, counts: Sequence[int]) -> None:
    """Prints one table for several numbers of ranks, and checks that global methods agree."""
    epochs = [
        epoch
        for count in counts
        for epoch in read_metrics(folder / f"ranks-{count}" / "metrics.jsonl")
    ]
    epochs.sort(key=lambda e: list(COLOURS).index(e.method))
    report = Report(folder, writes=True)
    report.add(epochs)
    report.print_table()
    report.plot_curves()
    shutil.copy(folder / f"ranks-{counts[-1]}" / "gramian.png", folder)
    for method in ("mean", "upgrad"):
        curves = {}
        for epoch in epochs:
            if epoch.method == method:
                key = (epoch.seed, epoch.epoch)
                curves.setdefault(epoch.ranks, {})[key] = epoch.train_loss
        if len(curves) < 2:
            continue
        first, *others = curves.values()
        differences = [abs(first[key] - other[key]) for other in others for key in first]
        largest = max(differences)
        print(f"{method}: the curves of {sorted(curves)} ranks differ by at most {largest:.1e}")
        if not all(difference <= 1e-8 for difference in differences):  # false for NaN too
            raise SystemExit(f"{method} should not depend on the number of ranks")
