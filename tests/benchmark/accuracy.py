"""The rounding of the engine's Gramian, on the five models of the speed table.

    python -m tests.benchmark.accuracy [--models mlp256 cnn] [--batch 16]

The error is the largest |G - G'|_ij / (|g_i| |g_j|), where G' is made in float64 from the very
inputs and output gradients of the layers that the network computed in its own precision.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

from jddist.autogram import Engine
from tests._oracle import rows_of_factors

from .models import MODELS, Model

PRECISIONS = ("float32", "bfloat16 autocast", "bfloat16")


def error(model: Model, precision: str, batch: int) -> float:
    """The largest relative error of an entry of the Gramian."""
    torch.manual_seed(0)
    network = model.make()
    x, y = model.data(batch)
    if precision == "bfloat16":
        network = network.to(torch.bfloat16)
        x = x.to(torch.bfloat16) if x.is_floating_point() else x

    def losses(output: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), y, reduction="none")

    engine = Engine(network, batch_dim=0)
    autocast = precision == "bfloat16 autocast"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = network(x)
        rows = rows_of_factors(network, x, losses)
    found = engine.compute_gramian(losses(output)).double()
    norms = rows.norm(dim=1)
    return float(((found - rows @ rows.T).abs() / norms.outer(norms)).max())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, batch {arguments.batch}, largest relative error of an entry")
    for name in arguments.models:
        cells = [f"{p} {error(MODELS[name], p, arguments.batch):.1e}" for p in PRECISIONS]
        print(" | ".join([f"{MODELS[name].title:<56}", *cells]), flush=True)


if __name__ == "__main__":
    main()
