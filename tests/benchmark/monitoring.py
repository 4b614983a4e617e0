"""What recording costs: steps with a recorder over the same steps without.

    python -m tests.benchmark.monitoring [--cases digits mlp256] [--every 10] [--rounds 15]

A step is forward, Gramian, weights, gradient, and the optimizer's step. Both variants run
interleaved in one process, on one thread, in blocks of ``every`` steps, of which one is recorded;
what counts is the median over blocks of the ratio of process times. The recorder writes JSON lines
to a folder that is deleted afterwards; "+ TensorBoard" adds that sink. "one record" is what a step
takes longer that is recorded.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jddist.aggregation import UPGradWeighting
from jddist.autogram import Engine
from jddist.monitoring import Recorder, TensorBoard

from .models import MODELS

Step = Callable[[], None]
_WARM_UP = 17  # the engine's self-check is due at the 1st, 2nd, 4th, 8th, 16th step


@dataclass(frozen=True)
class Case:
    """Something to train.

    Attributes:
        title: Its name in the table.
        make: Builds the network.
        data: The batch.
        tasks: Whether objectives are means per class, and not samples.
    """

    title: str
    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    tasks: bool = False


def _digits() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()


def _images(batch: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.rand(batch, 64).double(), torch.arange(batch) % 10)


CASES = {
    "digits": Case("digits' network, 32 samples", _digits, _images(32)),
    "tasks": Case("the same, 10 tasks of a batch of 256", _digits, _images(256), tasks=True),
    **{name: Case(model.title, model.make, model.data) for name, model in MODELS.items()},
}


def make_step(case: Case, recorder: Recorder | None) -> Step:
    """A function that takes one step."""
    torch.manual_seed(0)
    x, y = case.data()
    model = case.make()
    engine = Engine(model, batch_dim=None if case.tasks else 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    weighting = UPGradWeighting()
    if recorder is not None:
        recorder.watch(engine)
    members = F.one_hot(y).T.to(x.dtype if x.is_floating_point() else torch.float32)
    members = members / members.sum(dim=1, keepdim=True).clamp(min=1)

    def step() -> None:
        optimizer.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        engine.backward(members.to(losses) @ losses if case.tasks else losses, weighting)
        optimizer.step()

    return step


def measure(
    case: Case, folder: str, every: int, rounds: int, tensorboard: bool
) -> tuple[float, list[float], float]:
    """Seconds of a plain step, ratios of blocks, and seconds of one record."""
    sinks = [TensorBoard(folder)] if tensorboard else []
    recorder = Recorder(folder, sinks=sinks, every=every)
    plain, recorded = make_step(case, None), make_step(case, recorder)
    for _ in range(_WARM_UP):
        plain()
        recorded()
    while recorder._due != 0:  # so that each block's first step is recorded
        plain()
        recorded()
    ratios, plain_times, extra = [], [], []
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        times = []
        for _ in range(every):  # one by one, so that what else the machine does hits both
            for step in (plain, recorded):
                start = time.process_time()
                step()
                times.append(time.process_time() - start)
        without, with_ = times[::2], times[1::2]
        ratios.append(sum(with_) / sum(without))
        plain_times += without
        extra.append(with_[0] - without[0])
    gc.enable()
    recorder.close()
    return statistics.median(plain_times), sorted(ratios), statistics.median(extra)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, one thread, every {arguments.every}th step recorded")
    for name in arguments.cases:
        for tensorboard in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                seconds, ratios, extra = measure(
                    CASES[name], folder, arguments.every, arguments.rounds, tensorboard
                )
            low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            title = CASES[name].title + (" + TensorBoard" if tensorboard else "")
            print(
                f"{title:<64} {1e3 * seconds:7.2f} ms | one record {1e3 * extra:6.2f} ms | ratio "
                f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}) | from one record and "
                f"one step: {1 + extra / (arguments.every * seconds):.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
