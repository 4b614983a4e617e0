"""Instance-wise risk minimisation on scikit-learn's digits: every sample is an objective.

Three ways to train the same small network by plain SGD, with a global batch of 32 images sharded
over the ranks:

mean          the ordinary mean of the losses;
upgrad        Jacobian descent with UPGrad on the global batch, by jddist;
local-upgrad  what people do today: each rank runs UPGrad on its own part of the batch, and
              DistributedDataParallel averages the updates.

The first two do not depend on the number of ranks; the third decays towards the mean as ranks are
added. What is compared is optimisation: the area under the training-loss curve, which is the mean
over epochs of the loss on all 1,024 training images, measured after each epoch. Each method takes
the learning rate of a small grid that gives it the smallest area on a seed of its own.

With ``--checkpoint-dir`` it goes on by itself when ``torchrun --max-restarts`` starts it again, or
when the same command is given again after a SIGTERM, as if there had been no interruption.

    torchrun --standalone --nproc-per-node 2 examples/digits.py    # one number of ranks
    python examples/digits.py --nproc 4                            # 1, 2 and 4 ranks, one table
    python examples/digits.py --method upgrad --monitoring runs/monitor
    python -m jddist.monitoring report runs/monitor                # what its steps were made of
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from _digits_ranks import relaunch
from _digits_report import Epoch, Report, write_heat_map
from _digits_resume import Keeper, Stopped
from _ranks import Ranks, leave_ranks, start_ranks
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from jddist.aggregation import UPGradWeighting
from jddist.autogram import Engine
from jddist.checkpoint import StopSignals
from jddist.distribution import Local
from jddist.linalg import AutomaticProjector
from jddist.monitoring import Recorder

METHODS = ("mean", "upgrad", "local-upgrad")
LEARNING_RATES = (0.2, 0.4, 0.8, 1.6)
TRAINING_IMAGES = 1024
GRID_SEED = 1000  # apart from the seeds that are reported


@dataclass(frozen=True)
class Data:
    """Images [n, 64] in [0, 1] and labels [n], on this rank's device."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data(device: torch.device) -> Data:
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
    x = (torch.from_numpy(digits.data)[order] / 16).to(device)
    y = torch.from_numpy(digits.target)[order].to(device)
    n = TRAINING_IMAGES
    return Data(x[:n], y[:n], x[n:], y[n:])


def make_network(seed: int, ranks: Ranks) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)]
    network = nn.Sequential(*layers).double().to(ranks.device)
    return network if ranks.size == 1 else DistributedDataParallel(network)


def make_step(
    method: str, network: nn.Module, ranks: Ranks, recorder: Recorder | None = None
) -> Callable[[Tensor, int], None]:
    """How a method turns this rank's losses, of a batch of some size, into ``.grad``."""
    # norm_eps=0: by default UPGrad turns into the mean when gradients become small.
    weighting = UPGradWeighting(projector=AutomaticProjector(norm_eps=0.0))
    if method == "upgrad":
        engine = Engine(network, batch_dim=0)
        if recorder is not None:
            recorder.watch(engine)

        def step(losses: Tensor, batch_size: int) -> None:
            engine.backward(losses, weighting)

    elif method == "local-upgrad":
        inner = network.module if isinstance(network, DistributedDataParallel) else network
        local_engine = Engine(inner, batch_dim=0, distribution=Local())

        def step(losses: Tensor, batch_size: int) -> None:
            losses.backward(weighting(local_engine.compute_gramian(losses)))

    else:

        def step(losses: Tensor, batch_size: int) -> None:
            (losses.sum() * ranks.size / batch_size).backward()

    return step


def train(
    method: str, seed: int, lr: float, args: argparse.Namespace, data: Data, ranks: Ranks
) -> list[Epoch]:
    """Trains one network, or what is left to train of it; the measurements after each epoch."""
    network = make_network(seed, ranks)
    recorder = None
    if args.monitoring and method == "upgrad" and seed == 0:
        recorder = Recorder(args.monitoring, every=args.monitoring_every)
    step = make_step(method, network, ranks, recorder)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    criterion = nn.CrossEntropyLoss(reduction="none")
    shuffle = torch.Generator().manual_seed(seed)
    folder = None
    if args.checkpoint_dir is not None:
        folder = Path(args.checkpoint_dir) / f"{method}-seed-{seed}-lr-{lr}"
    keeper = Keeper(folder, args.checkpoint_every, args.stop, network, optimizer)
    position = keeper.load()
    done = len(position.epochs)
    for number in range(1, args.epochs + 1):
        start = ranks.clock()
        order = torch.randperm(TRAINING_IMAGES, generator=shuffle)
        if number <= done:
            continue
        for indices in order.split(args.batch_size)[position.batches :]:
            mine = ranks.part(indices).to(ranks.device)
            losses = criterion(network(data.train_x[mine]), data.train_y[mine])
            optimizer.zero_grad()
            step(losses, len(indices))
            optimizer.step()
            position.batches += 1
            position.seconds, start = position.seconds + ranks.clock() - start, ranks.clock()
            keeper.after_step(position)
        with torch.no_grad():
            loss = criterion(network(data.train_x), data.train_y).mean()
            hits = network(data.test_x).argmax(dim=1) == data.test_y
        position.epochs.append(
            Epoch(
                method=method,
                ranks=ranks.size,
                seed=seed,
                lr=lr,
                epoch=number,
                train_loss=float(loss),
                test_accuracy=float(hits.double().mean()),
                seconds=position.seconds,
            )
        )
        position.batches, position.seconds = 0, 0.0
    if done < args.epochs:
        keeper.finish(position)
    if recorder is not None:
        recorder.close()
    return position.epochs[: args.epochs]


def area(epochs: list[Epoch]) -> float:
    """The mean over epochs of the training loss; infinite if training diverged."""
    value = statistics.fmean(epoch.train_loss for epoch in epochs)
    return value if value == value else float("inf")


def run(args: argparse.Namespace, data: Data, ranks: Ranks) -> None:
    """Trains all methods and seeds on the ranks that are there, and reports."""
    report = Report(Path(args.out), writes=ranks.rank == 0)
    rates = args.lr or LEARNING_RATES
    runs = len(args.method) * (args.seeds + (len(rates) if len(rates) > 1 else 0))
    with tqdm(total=runs, disable=ranks.rank != 0, unit="run") as bar:
        for method in args.method:
            lr = rates[0]
            if len(rates) > 1:
                areas = {}
                for candidate in rates:
                    bar.set_description(f"{method}: learning rate {candidate}")
                    areas[candidate] = area(train(method, GRID_SEED, candidate, args, data, ranks))
                    bar.update()
                lr = min(areas, key=lambda candidate: areas[candidate])
            for seed in range(args.seeds):
                bar.set_description(f"{method}: seed {seed}")
                report.add(train(method, seed, lr, args, data, ranks))
                bar.update()
    if ranks.rank == 0:
        report.print_table()
        report.plot_curves()
    plot_gramian(args, data, ranks)


def plot_gramian(args: argparse.Namespace, data: Data, ranks: Ranks) -> None:
    """The heat map of one global batch: who agrees with whom at the start of training."""
    network = make_network(0, ranks)
    engine = Engine(network, batch_dim=0)
    batch = torch.arange(args.batch_size)
    batch = batch[data.train_y[: args.batch_size].cpu().argsort(stable=True)]
    mine = ranks.part(batch).to(ranks.device)
    criterion = nn.CrossEntropyLoss(reduction="none")
    gramian = engine.compute_gramian(criterion(network(data.train_x[mine]), data.train_y[mine]))
    if ranks.rank == 0:
        write_heat_map(Path(args.out), gramian.cpu(), data.train_y.cpu()[batch].tolist())


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="images over all ranks")
    parser.add_argument("--lr", type=float, nargs="+", help="learning rates to choose from")
    parser.add_argument("--nproc", type=int, help="compare 1, 2 and this many ranks")
    parser.add_argument("--checkpoint-dir", help="where checkpoints go, and are looked for")
    parser.add_argument(
        "--checkpoint-every", type=int, default=32, metavar="STEPS", help="steps between them"
    )
    parser.add_argument("--out", default="runs/digits", help="where results go")
    # (--monitor would be taken for an option of torchrun.)
    parser.add_argument("--monitoring", metavar="DIR", help="record upgrad's first seed there")
    parser.add_argument(
        "--monitoring-every", type=int, default=10, help="record one of so many steps"
    )
    parser.add_argument("--smoke", action="store_true", help="one seed, one epoch, one rate")
    args = parser.parse_args(arguments)
    args.stop = None
    if args.smoke:
        args.seeds, args.epochs, args.lr = 1, 1, [0.1]
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    if args.nproc is not None:
        relaunch(__file__, args)
        return
    ranks = start_ranks()
    try:
        with StopSignals() if args.checkpoint_dir else nullcontext() as args.stop:
            run(args, load_data(ranks.device), ranks)
    except Stopped as stopped:
        if ranks.rank == 0:
            print(f"digits.py {stopped}", file=sys.stderr, flush=True)
        sys.exit(stopped.exit_code)
    finally:
        leave_ranks()


if __name__ == "__main__":
    main()
