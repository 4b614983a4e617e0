"""Weak scaling: a step on one rank against two ranks with twice the global batch.

    python -m tests.benchmark.weak_scaling [--models mlp256] [--rounds 5] [--prefer bytes time]

Each rank has one thread and the batch of the model's row. A step is the forward, the Gramian of all
ranks' losses, one run of a weighting that does nothing, and the weighted gradient; runs on one and
on two ranks take turns. The ratio is the time of one rank over that of two: of the wall clock, and
of the process time, which a busy machine disturbs less but which leaves waiting out. Of all steps
the shortest counts: what else runs on the machine only adds to it.

Twice the objectives are four times the entries of the Gramian: with every pair computed once, a
rank's part of them doubles. "arithmetic" is the ratio of the operations of the busiest rank, the
plan's and those of the forward and backward, as if nothing had to be sent. An ordinary step of
DistributedDataParallel has arithmetic 1; what it loses is the price of this machine's messages, and
"of plain" is the ratio in units of that of an ordinary step.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from jddist.autogram import Engine
from jddist.distribution import plan
from tests._ranks import run_ranks

from .models import MODELS, Model
from .planning import shapes_of

_WARM_UP = 4
# The engine's self-check is due at the 1st, 2nd, 4th and 8th step: steps 9 to 15 are without one.
_STEPS = 6


def _times(rank: int, world_size: int, name: str, variant: str) -> list[list[float]]:
    """Wall and process seconds of each step."""
    warnings.simplefilter("ignore")
    model = MODELS[name]
    torch.manual_seed(0)
    network = DistributedDataParallel(model.make())
    torch.manual_seed(rank)
    x, y = model.data()
    step = _plain(network, x, y, name)
    if variant != "plain":
        step = _jacobian_descent(network, x, y, name, variant)
    for _ in range(8 if variant != "plain" else _WARM_UP):
        step()
    found = []
    for _ in range(_STEPS):
        torch.distributed.barrier()
        wall, process = time.perf_counter(), time.process_time()
        step()
        found.append([time.perf_counter() - wall, time.process_time() - process])
    return found


def _plain(network: torch.nn.Module, x: Tensor, y: Tensor, name: str) -> Callable[[], None]:
    def step() -> None:
        network.zero_grad()
        MODELS[name].losses(network, x, y).mean().backward()

    return step


def _jacobian_descent(
    network: torch.nn.Module, x: Tensor, y: Tensor, name: str, prefer: str
) -> Callable[[], None]:
    engine = Engine(network, batch_dim=0, prefer=prefer)  # type: ignore[arg-type]

    def step() -> None:
        network.zero_grad()
        losses = MODELS[name].losses(network, x, y)
        engine.backward(losses, lambda gramian: torch.full_like(gramian[0], 1 / len(gramian)))

    return step


def measure(name: str, variant: str, rounds: int) -> list[float]:
    """The ratios of the wall clock and of the process time."""
    seconds: dict[int, list[list[float]]] = {1: [], 2: []}
    for _ in range(rounds):
        for world_size in (1, 2):
            ranks = run_ranks(_times, world_size, name, variant, timeout=300)
            # A step lasts as long as on its slowest rank.
            seconds[world_size] += [
                [max(r[i][c] for r in ranks) for c in range(2)] for i in range(_STEPS)
            ]
    return [min(t[c] for t in seconds[1]) / min(t[c] for t in seconds[2]) for c in range(2)]


def arithmetic(model: Model, prefer: str) -> float:
    """The operations of one rank alone over those of the busier one of two."""
    torch.manual_seed(0)
    network, (x, y) = model.make(), model.data()
    with FlopCounterMode(display=False) as counted:
        model.losses(network, x, y).mean().backward()
    step = counted.get_total_flops()
    shapes, columns = shapes_of(model)
    gramian = [
        float(
            plan([shapes] * ranks, columns, [model.batch] * ranks, prefer=prefer).flops.max()  # type: ignore[arg-type]
        )
        for ranks in (1, 2)
    ]
    return (step + gramian[0]) / (step + gramian[1])


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["mlp256", "transformer192"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefer", nargs="+", choices=["bytes", "time"], default=["bytes", "time"])
    arguments = parser.parse_args()
    print("time of one rank over that of two, one thread each, twice the global batch")
    for name in arguments.models:
        plain = [1.0, 1.0]
        for variant in ["plain", *arguments.prefer]:
            found = measure(name, variant, arguments.rounds)
            cells = [f"{MODELS[name].title:<48}", f"{variant:<5}"]
            if variant == "plain":
                plain = found
                cells += [f"wall {found[0]:.2f}", f"process {found[1]:.2f}", "arithmetic 1.00"]
            else:
                of_plain = [a / b for a, b in zip(found, plain, strict=True)]
                cells += [
                    f"wall {found[0]:.2f} (of plain {of_plain[0]:.2f})",
                    f"process {found[1]:.2f} (of plain {of_plain[1]:.2f})",
                    f"arithmetic {arithmetic(MODELS[name], variant):.2f}",
                ]
            print(" | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
