"""Peak memory of a step of tasks on parameters in ``fully_shard``, per rank, over a plain step.

    python -m tests.benchmark.sharded_memory [--ranks 2 4] [--layers 13] [--width 2048] [--tasks 4]

Every variant runs in processes of its own. What counts is the largest resident set during a step
after a step, so that what is made once is there already; the model is there before. The bounds are
those of a step in which no rank holds more than its columns of the rows: over a plain step
m * (n / W) * s * 1.25 bytes, with reshard="speed" n * s more; m tasks, n numbers of s bytes in all
parameters, W ranks.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from jddist import attach, grouping
from jddist.aggregation import (
    Aggregator,
    GradDrop,
    Mean,
    MoCo,
    TrimmedMean,
    UPGrad,
    UPGradWeighting,
)
from jddist.autogram import Engine
from jddist.autojac import backward, jac_to_grad, jac_to_grad_groups
from tests._ranks import run_ranks

_SAMPLES = 8
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def _engine(reshard: str) -> Callable[[nn.Module], Callable[[Tensor], object]]:
    def prepare(model: nn.Module) -> Callable[[Tensor], object]:
        engine = Engine(model, batch_dim=None, reshard=reshard)  # type: ignore[arg-type]
        return lambda losses: engine.backward(losses, UPGradWeighting())

    return prepare


def _rows(
    reshard: str, aggregate: Callable[[nn.Module], object]
) -> Callable[[nn.Module], Callable[[Tensor], object]]:
    def prepare(model: nn.Module) -> Callable[[Tensor], object]:
        from torch.distributed.tensor import Partial

        attach(model, objectives=Partial("avg"), reshard=reshard)  # type: ignore[arg-type]

        def step(losses: Tensor) -> None:
            backward(losses)
            aggregate(model)

        return step

    return prepare


def _together(model: nn.Module) -> object:
    return jac_to_grad(list(model.parameters()), UPGrad())


def _by(make: Callable[[], Aggregator]) -> Callable[[nn.Module], object]:
    def aggregate(model: nn.Module) -> object:
        return jac_to_grad(list(model.parameters()), aggregator)

    aggregator = make()
    return aggregate


def _per_layer(model: nn.Module) -> object:
    groups = grouping.per_layer(model)
    return jac_to_grad_groups(groups, [UPGrad() for _ in groups])


VARIANTS: dict[str, Callable[[nn.Module], Callable[[Tensor], object]]] = {
    "plain": lambda model: lambda losses: losses.sum().backward(),
    "engine, memory": _engine("memory"),
    "engine, speed": _engine("speed"),
    "jac_to_grad, memory": _rows("memory", _together),
    "jac_to_grad, speed": _rows("speed", _together),
    "groups, memory": _rows("memory", _per_layer),
    "GradDrop, memory": _rows("memory", _by(GradDrop)),
    "TrimmedMean, memory": _rows("memory", _by(lambda: TrimmedMean(1))),
    "Mean, memory": _rows("memory", _by(Mean)),
    "MoCo, memory": _rows("memory", _by(MoCo)),
}


class Network(nn.Module):
    """Equal layers, without biases."""

    def __init__(self, layers: int, width: int, tasks: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        self.tasks = tasks

    def forward(self, x: Tensor) -> Tensor:
        """The losses [tasks]."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return torch.stack([part.square().mean() for part in x.chunk(self.tasks, dim=1)])


def _resident(field: str) -> int:
    """Bytes, of a line of the process's status: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _peak(
    rank: int, world_size: int, variant: str, layers: int, width: int, tasks: int
) -> list[int]:
    """The largest resident set during a step, and that before it, in bytes."""
    # Whatever is freed goes back to the system at once.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Network(layers, width, tasks)
    mesh = init_device_mesh("cpu", (world_size,))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter.data.to_local(), std=width**-0.5)
    step = VARIANTS[variant](model)
    x = torch.randn(_SAMPLES, width)
    for i in range(3):
        model.zero_grad()
        gc.collect()
        before = _resident("VmRSS")
        if i:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        step(model(x))
    return [_resident("VmHWM"), before]


def main(arguments: list[str]) -> int:
    """Prints the table; 1 if a bound is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args(arguments)
    size = args.layers * args.width**2 * 4
    print(
        f"{size / 2**20:.0f} MiB of parameters, {args.tasks} tasks; MiB per rank, the largest rank"
    )
    exceeded = False
    for ranks in args.ranks:
        plain = 0.0
        for variant in dict.fromkeys(["plain", *args.variants]):
            options = (variant, args.layers, args.width, args.tasks)
            found = run_ranks(_peak, ranks, *options, timeout=300)
            peak = max(peak for peak, _ in found)
            if variant == "plain":
                plain = peak
            rows = args.tasks * size / ranks
            bound = plain + 1.25 * rows + (size if "speed" in variant else 0)
            if variant.startswith("MoCo"):  # it remembers as many rows, and brings them in order
                bound += 2.0 * rows
            cells = [f"{ranks} ranks", f"{variant:<20}", f"peak {peak / 2**20:5.0f}"]
            if variant != "plain":
                ok = peak <= bound
                exceeded = exceeded or not ok
                cells.append(f"over plain {(peak - plain) / 2**20:5.0f}")
                cells.append(f"bound {(bound - plain) / 2**20:5.0f}")
                cells.append(f"rows {rows / 2**20:4.0f}{'' if ok else '  EXCEEDED'}")
            print(" | ".join(cells), flush=True)
    return int(exceeded)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
