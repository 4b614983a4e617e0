"""A whole step of Jacobian descent against a plain forward and backward: the table of ratios.

    python -m tests.benchmark.engine [--models mlp256 cnn] [--repeats 15] [--no-peer] [--memory]

A step is the forward, the Gramian of one loss per sample, and the gradient weighted with given
weights (no quadratic program is solved). All variants run interleaved in one process, on one
thread; what counts is the median of the process time. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import gc
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jddist.autogram import Engine

from .models import MODELS, Model

Step = Callable[[], None]
# Steps until the engine's self-check, due at the 1st, 2nd, 4th, 8th, ..., is rare: the next ones
# after 16 are the 32nd and 64th.
_WARM_UP = 16


def plain_step(model: Model) -> Step:
    """Forward, mean, backward."""
    network, x, y, _ = _made(model)

    def step() -> None:
        network.zero_grad()
        model.losses(network, x, y).mean().backward()

    return step


def keeping_step(model: Model) -> Step:
    """``engine.backward``: the weighted gradient comes from what the Gramian was made of."""
    network, x, y, weights = _made(model)
    engine = Engine(network, batch_dim=0)

    def step() -> None:
        network.zero_grad()
        engine.backward(model.losses(network, x, y), lambda _gramian: weights)

    return step


def second_backward_step(model: Model) -> Step:
    """``compute_gramian`` and an ordinary weighted backward."""
    network, x, y, weights = _made(model)
    engine = Engine(network, batch_dim=0)

    def step() -> None:
        network.zero_grad()
        losses = model.losses(network, x, y)
        engine.compute_gramian(losses)
        losses.backward(engine.local_weights(weights))

    return step


def peer_step(model: Model) -> Step:
    """The same with torchjd."""
    from torchjd.autogram import Engine as PeerEngine

    network, x, y, weights = _made(model)
    engine = PeerEngine(network, batch_dim=0)

    def step() -> None:
        network.zero_grad()
        losses = model.losses(network, x, y)
        engine.compute_gramian(losses)
        losses.backward(weights)

    return step


VARIANTS: dict[str, Callable[[Model], Step]] = {
    "plain": plain_step,
    "book-keeping": keeping_step,
    "second backward": second_backward_step,
    "torchjd": peer_step,
}


def _made(model: Model) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = model.data()
    network = copy.deepcopy(model.make())
    return network, x, y, torch.rand(len(y)) / len(y)


def measure(model: Model, variants: list[str], repeats: int) -> dict[str, list[float]]:
    """Process seconds of every repetition of every variant, interleaved."""
    steps = {name: VARIANTS[name](model) for name in variants}
    for name, step in steps.items():
        for _ in range(1 if name == "torchjd" else _WARM_UP if name != "plain" else 3):
            step()
    times: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    gc.disable()
    for repeat in range(repeats):
        for name, step in steps.items():
            if name == "torchjd" and repeat >= 3:
                continue  # it takes up to a hundred times as long
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    gc.enable()
    return times


def peak_memory(name: str, variant: str) -> float:
    """Peak resident bytes that three steps add to a process that has the model and its data."""
    command = [sys.executable, "-m", "tests.benchmark.engine", "--peak", name, variant]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _print_peak(name: str, variant: str) -> None:
    torch.set_num_threads(1)
    step = VARIANTS[variant](MODELS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step()
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def _row(model: Model, times: dict[str, list[float]]) -> str:
    plain = statistics.median(times["plain"])
    cells = [f"{model.title:<48}", f"{1e3 * plain:8.1f} ms"]
    for name, must in [("torchjd", None), ("book-keeping", 0), ("second backward", 1)]:
        if name not in times:
            continue
        ratios = sorted(t / plain for t in times[name])
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        limit = "" if must is None else f", must {model.must[must]}"
        cells.append(f"{name} {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}{limit})")
    return " | ".join(cells)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-peer", action="store_true", help="leave torchjd out: it is slow")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        _print_peak(*arguments.peak)
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    variants = [name for name in VARIANTS if name != "torchjd" or not arguments.no_peer]
    print(f"torch {torch.__version__}, one thread, ratio of process times to a plain step")
    for name in arguments.models:
        model = MODELS[name]
        measured = [v for v in variants if v != "torchjd" or model.peer]
        if arguments.memory:
            peaks = {variant: peak_memory(name, variant) for variant in measured}
            cells = [f"{v} {p / peaks['plain']:.2f}" for v, p in peaks.items() if v != "plain"]
            megabytes = f"{peaks['plain'] / 2**20:8.0f} MiB"
            print(" | ".join([f"{model.title:<48}", megabytes, *cells]), flush=True)
        else:
            print(_row(model, measure(model, measured, arguments.repeats)), flush=True)


if __name__ == "__main__":
    main()
