"""What would be sent and computed on many ranks: the table of the planner, for the five models.

    python -m tests.benchmark.planning [--models mlp256 cnn] [--ranks 2 8 64 1024]

Every rank has the batch of the model's row, in float32. Bytes are those that the busiest rank sends
for all layers; those of the Gramian itself, half of m x m in float64 once per step, stand beside
them. FLOPs are those of the busiest rank from the layers' factors on. No process group is needed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace

import torch

from jddist.autogram import Engine
from jddist.distribution import BlockShape, Plan, plan
from jddist.distribution.exchange import describe
from jddist.distribution.planning import Prefer

from .models import MODELS, Model

# The samples from which shapes are taken; the entries of a table read are scaled from them.
_SAMPLES = 4
_PREFERENCES: tuple[Prefer, ...] = ("bytes", "time")


def shapes_of(model: Model) -> tuple[list[BlockShape], list[int]]:
    """What a rank with the model's batch has for each parameter, and the parameters' sizes."""
    torch.manual_seed(0)
    network = model.make()
    engine = Engine(network, batch_dim=0)
    x, y = model.data(_SAMPLES)
    _, blocks = engine.prepare("shapes_of", model.losses(network, x, y), None)
    shapes = [
        replace(s, positions=s.positions * model.batch // _SAMPLES) if s.kind == "lookup" else s
        for s in describe(blocks, factors=True)
    ]
    return shapes, [entry.parameter.numel() for entry in engine.table.entries]


def row(model: Model, ranks: int, prefer: Prefer) -> str:
    """One line of the table."""
    shapes, columns = shapes_of(model)
    found = plan([shapes] * ranks, columns, [model.batch] * ranks, prefer=prefer)
    layers = float(found.bytes_sent.max()) - found.gramian_bytes
    cells = [
        f"{model.title:<48}",
        f"W = {ranks:<5}",
        f"{prefer:<5}",
        f"{layers / 2**20:10.1f} MiB",
        f"G {found.gramian_bytes / 2**20:10.1f} MiB",
        f"{float(found.flops.max()) / 1e9:10.1f} GFLOP",
        _schemes(found),
    ]
    return " | ".join(cells)


def _schemes(found: Plan) -> str:
    """How many parameters take each scheme."""
    counts: Counter[str] = Counter()
    for step in found.steps:
        counts[step.scheme.value] += len(step.parameters)
    return ", ".join(f"{n} {scheme}" for scheme, n in sorted(counts.items()))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8, 64, 1024])
    arguments = parser.parse_args()
    print("model | ranks | prefer | sent per rank for layers, for G | FLOPs per rank | parameters")
    for name in arguments.models:
        for ranks in arguments.ranks:
            for prefer in _PREFERENCES:
                print(row(MODELS[name], ranks, prefer), flush=True)


if __name__ == "__main__":
    main()
