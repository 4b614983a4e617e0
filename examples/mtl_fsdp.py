"""Multi-task learning on sharded parameters: two overlaid digits, left and right, and their sum.

Three tasks share a trunk in `fully_shard` (FSDP2). Each step differentiates the tasks by
`mtl_backward`, which leaves this rank's columns of the trunk's Jacobian in `.jac`, and aggregates
them by `jac_to_grad_groups`. Nothing in it depends on the number of ranks: the curves of 1, 2 and 4
ranks are the same. Choose the methods, and which parameters are aggregated together:

together     the whole trunk at once;
per_network  each of the trunk's blocks;
per_layer    each layer;
per_tensor   each weight and each bias.

    torchrun --standalone --nproc-per-node 2 examples/mtl_fsdp.py    # one number of ranks
    python examples/mtl_fsdp.py --nproc 4                            # 1, 2 and 4 ranks, compared
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _mtl_data import TASKS, Network, Pairs, errors_of, load_pairs, losses_of
from _mtl_report import Epoch, Report, Step, compare
from _ranks import Ranks, leave_ranks, start_ranks, torchrun, under_torchrun
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from jddist import aggregation, attach, grouping
from jddist.aggregation import Aggregator
from jddist.autojac import jac_to_grad_groups, mtl_backward
from jddist.linalg import AutomaticProjector

M = len(TASKS)
METHODS: dict[str, Callable[[], Aggregator]] = {
    "mean": aggregation.Mean,
    # norm_eps=0: by default UPGrad turns into the mean when gradients become small.
    "upgrad": lambda: aggregation.UPGrad(projector=AutomaticProjector(norm_eps=0.0)),
    "mgda": aggregation.MGDA,
    "pcgrad": aggregation.PCGrad,
    "cagrad": lambda: aggregation.CAGrad(0.4),
    "nashmtl": lambda: aggregation.NashMTL(M),
    "fairgrad": lambda: aggregation.FairGrad(1.0),
    "gradvac": aggregation.GradVac,
    "graddrop": aggregation.GradDrop,
    "random": aggregation.Random,
}
GROUPINGS: dict[str, Callable[[nn.Module], grouping.Groups]] = {
    "together": grouping.together,
    "per_network": grouping.per_network,
    "per_layer": grouping.per_layer,
    "per_tensor": grouping.per_tensor,
}


def make_network(seed: int, ranks: Ranks) -> Network:
    """The same network on any number of ranks; sharded if there are several."""
    torch.manual_seed(seed)
    network = Network().double().to(ranks.device)
    if ranks.size > 1:
        for module in (*network.trunk, *network.heads.values(), network):
            fully_shard(module)
    attach(network)
    return network


def gramian_of(parameters: list[nn.Parameter], ranks: Ranks) -> Tensor:
    """The inner products [m, m] of the tasks' gradients: each rank has some of the columns."""
    rows = [p.jac.to_local() if isinstance(p.jac, DTensor) else p.jac for p in parameters]
    flat = torch.cat([r.reshape(M, r[0].numel()) for r in rows], dim=1)
    return ranks.sum(flat @ flat.T)


def train(
    method: str,
    seed: int,
    args: argparse.Namespace,
    data: tuple[Pairs, Pairs],
    ranks: Ranks,
    bar: tqdm,
) -> tuple[list[Epoch], list[Step]]:
    """Trains one network; what was measured after each epoch and in each step."""
    training, test = data
    network = make_network(seed, ranks)
    groups = GROUPINGS[args.grouping](network.trunk)
    aggregators = [METHODS[method]().to(ranks.device) for _ in groups]
    shared = [p for group in groups for p in group]
    optimizer = torch.optim.SGD(network.parameters(), lr=args.lr, momentum=0.9)
    shuffle = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # for the random methods: alike on all ranks
    epochs: list[Epoch] = []
    steps: list[Step] = []
    for number in range(1, args.epochs + 1):
        start = ranks.clock()
        order = torch.randperm(len(training), generator=shuffle)[: args.pairs]
        for indices in order.split(args.batch_size):
            mine = training.at(ranks.part(indices).to(ranks.device))
            features, outputs = network(mine.images)
            losses = losses_of(outputs, mine)
            optimizer.zero_grad()
            mtl_backward([losses[task] for task in TASKS], features=features, count=len(mine))
            gramian = gramian_of(shared, ranks)
            weights = jac_to_grad_groups(groups, aggregators)
            torch.nn.utils.clip_grad_norm_(network.parameters(), args.max_norm)
            optimizer.step()
            steps.append(Step.of(method, ranks.size, seed, len(steps), gramian, weights))
            bar.update()
        seconds = ranks.clock() - start
        train_loss, _ = evaluate(network, training, ranks)
        test_loss, test_error = evaluate(network, test, ranks)
        epochs.append(
            Epoch(method, ranks.size, seed, number, train_loss, test_loss, test_error, seconds)
        )
    return epochs, steps


@torch.no_grad()
def evaluate(network: Network, pairs: Pairs, ranks: Ranks) -> tuple[list[float], list[float]]:
    """Each task's mean loss and error rate; every rank looks at its part of the pairs."""
    indices = torch.arange(len(pairs), device=pairs.images.device)
    mine = pairs.at(ranks.part(indices))
    _, outputs = network(mine.images)
    losses, errors = losses_of(outputs, mine), errors_of(outputs, mine)
    sums = [losses[task] * len(mine) for task in TASKS] + [errors[task].double() for task in TASKS]
    means = (ranks.sum(torch.stack(sums)) / len(pairs)).tolist()
    return means[:M], means[M:]


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    """Trains all methods and seeds on the ranks that are there, and reports."""
    data = load_pairs(ranks.device)
    report = Report(Path(args.out), args.grouping, writes=ranks.rank == 0)
    batches = -(-min(args.pairs, len(data[0])) // args.batch_size)
    total = len(args.method) * args.seeds * args.epochs * batches
    with tqdm(total=total, disable=ranks.rank != 0, unit="step") as bar:
        for method in args.method:
            for seed in range(args.seeds):
                bar.set_description(f"{method}, seed {seed}")
                report.add(*train(method, seed, args, data, ranks, bar))
    if ranks.rank == 0:
        report.print_table()
        report.plot()


def relaunch(args: argparse.Namespace) -> None:
    """Runs this script on 1, 2 and ``--nproc`` ranks, and compares the results."""
    counts = sorted({1, 2, args.nproc} if args.nproc > 1 else {1})
    options = ["--method", *args.method, "--grouping", args.grouping]
    for name in ("seeds", "epochs", "pairs", "batch_size", "lr", "max_norm"):
        options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    for count in counts:
        torchrun(__file__, count, [*options, "--out", str(Path(args.out) / f"ranks-{count}")])
    compare(Path(args.out), args.grouping, counts)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        default=["mean", "upgrad"],
        help="the aggregators to compare (default: mean upgrad)",
    )
    parser.add_argument(
        "--grouping", choices=GROUPINGS, default="together", help="what is aggregated together"
    )
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=2048, help="pairs of digits in each epoch")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs over all ranks")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")
    parser.add_argument("--max-norm", type=float, default=5.0, help="clip gradients to this norm")
    parser.add_argument(
        "--nproc", type=int, default=2, help="without torchrun: compare 1, 2 and this many ranks"
    )
    parser.add_argument("--out", default="runs/mtl_fsdp", help="where results go")
    parser.add_argument("--smoke", action="store_true", help="one seed, two short epochs")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.seeds, args.epochs, args.pairs = 1, 2, 512
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    if not under_torchrun():
        relaunch(args)
        return
    ranks = start_ranks()
    try:
        run(args, ranks)
    finally:
        leave_ranks()


if __name__ == "__main__":
    main()
