"""What the examples of the training frameworks share: arguments, the network, measurements."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from _digits_report import Epoch, Report
from _ranks import torchrun, under_torchrun
from digits import Data
from torch import Tensor, nn

from jddist.aggregation import UPGradWeighting
from jddist.linalg import AutomaticProjector

METHODS = ("mean", "upgrad")


def parse(description: str | None, name: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="images over all ranks")
    parser.add_argument("--lr", type=float, default=0.8, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc", type=int, default=2, help="ranks, if torchrun started none")
    parser.add_argument("--out", default=f"runs/{name}", help="where results go")
    parser.add_argument("--smoke", action="store_true", help="one epoch")
    args = parser.parse_args()
    if args.smoke:
        args.epochs = 1
    return args


def relaunched(script: str, args: argparse.Namespace) -> bool:
    """Runs the script on ``--nproc`` ranks, unless this process is one of them."""
    if under_torchrun():
        return False
    torchrun(script, args.nproc, sys.argv[1:])
    return True


def make_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()


def upgrad() -> UPGradWeighting:
    """norm_eps=0: by default UPGrad turns into the mean when gradients become small."""
    return UPGradWeighting(projector=AutomaticProjector(norm_eps=0.0))


def per_rank(batch_size: int, ranks: int) -> int:
    """This rank's share of a batch, which has to divide."""
    if batch_size % ranks:
        raise SystemExit(f"--batch-size {batch_size} does not divide by {ranks} ranks")
    return batch_size // ranks


@torch.no_grad()
def measure(
    network: nn.Module,
    data: Data,
    *,
    method: str,
    ranks: int,
    epoch: int,
    seconds: float,
    args: argparse.Namespace,
) -> Epoch:
    """One line of the report: the loss on all training images, and the test accuracy."""
    loss = nn.functional.cross_entropy(network(data.train_x), data.train_y)
    hits: Tensor = network(data.test_x).argmax(dim=1) == data.test_y
    return Epoch(
        method=method,
        ranks=ranks,
        seed=args.seed,
        lr=args.lr,
        epoch=epoch,
        train_loss=float(loss),
        test_accuracy=float(hits.double().mean()),
        seconds=seconds,
    )


def report(epochs: list[Epoch], folder: str, *, writes: bool) -> None:
    """The table and the plot, on the rank that writes."""
    result = Report(Path(folder), writes=writes)
    result.add(epochs)
    if writes:
        result.print_table()
        result.plot_curves()
