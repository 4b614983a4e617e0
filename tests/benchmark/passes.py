"""Rows of K task losses: one pass for all of them, or one pass each?

    python -m tests.benchmark.passes [--tasks 4 8] [--repeats 5]

Prints the time of the one pass as a share of the time of K passes, next to the size of the widest
activation, by which the engine chooses (`jddist.autogram.differentiate.objectives_at_once`). One
thread, process time, interleaved, minima.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jddist.autogram.differentiate import objectives_at_once, row_gradients
from jddist.autogram.layout import OutputLayout

from .models import MODELS

BATCHES = {"mlp256": (32, 256, 1024), "cnn": (4, 16, 64), "transformer192": (1, 4, 16)}


def losses_of(trunk: nn.Module, inputs: Tensor, tasks: int) -> tuple[Tensor, list[nn.Parameter]]:
    """The mean losses [tasks] of as many linear heads, and all parameters."""
    features = trunk(inputs)
    heads = nn.ModuleList(nn.Linear(features.shape[1], 10) for _ in range(tasks))
    targets = torch.randint(10, (len(inputs),))
    losses = torch.stack([F.cross_entropy(head(features), targets) for head in heads])
    return losses, [*trunk.parameters(), *heads.parameters()]


def widest_output(trunk: nn.Module, inputs: Tensor) -> int:
    """Bytes of the largest output of a layer with parameters."""
    sizes = []
    handles = [
        module.register_forward_hook(lambda _m, _i, out: sizes.append(out.nbytes))
        for module in trunk.modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    trunk(inputs)
    for handle in handles:
        handle.remove()
    return max(sizes)


def measure(losses: Tensor, parameters: list[nn.Parameter], repeats: int) -> tuple[float, float]:
    """Process seconds of one pass for each loss, and of one pass for all."""
    layout = OutputLayout.of(losses, None)
    best = {1: float("inf"), len(losses): float("inf")}
    for _ in range(repeats):
        for chunk in best:
            start = time.process_time()
            row_gradients(losses, layout, parameters, chunk=chunk)
            best[chunk] = min(best[chunk], time.process_time() - start)
    return best[1], best[len(losses)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, one thread, time of one pass / time of K passes")
    for name, batches in BATCHES.items():
        for batch in batches:
            model = MODELS[name]
            trunk = model.make()
            inputs, _ = model.data(batch)
            widest = widest_output(trunk, inputs)
            taken = "each" if objectives_at_once(widest, inputs.device) == 1 else "all"
            cells = []
            for tasks in arguments.tasks:
                each, together = measure(*losses_of(trunk, inputs, tasks), arguments.repeats)
                cells.append(f"K = {tasks}: {together / each:.2f}")
            print(
                f"{name:<15} b = {batch:<5} widest {widest / 2**20:6.2f} MiB, taken: {taken:<4} | "
                + " | ".join(cells),
                flush=True,
            )


if __name__ == "__main__":
    main()
