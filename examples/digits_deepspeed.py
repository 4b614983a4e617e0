"""Instance-wise risk minimisation on scikit-learn's digits with DeepSpeed, on any ZeRO stage.

Every image of the global batch is an objective. The training loop is DeepSpeed's own; all that
differs from the ordinary one is a line before it and that the losses are not averaged:

    jddist.attach(model_engine, weighting=UPGradWeighting(), batch_dim=0)
    model_engine.backward(losses)   # one loss for each image of this rank

It is compared with the mean of the losses. Neither depends on the stage or on the number of ranks.

    bash launch/deepspeed.sh                                   # ZeRO stage 2 on 2 ranks
    deepspeed --no_local_rank examples/digits_deepspeed.py --config launch/deepspeed/zero3.json
    python examples/digits_deepspeed.py --nproc 2              # by torchrun
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _digits_report import Epoch, Report
from _ranks import torchrun, under_torchrun
from digits import TRAINING_IMAGES, Data, Ranks, leave_ranks, load_data
from torch import nn

import jddist
from jddist.aggregation import UPGradWeighting
from jddist.linalg import AutomaticProjector

METHODS = ("mean", "upgrad")
CONFIG = Path(__file__).parents[1] / "launch" / "deepspeed" / "zero2.json"


def start_ranks() -> Ranks:
    """Joins the ranks that a launcher started; without one, there is one rank."""
    torch.set_num_threads(1)
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in alone.items()}})
    device = torch.device("cpu")
    # NCCL wants a GPU for each rank; with fewer of them all ranks stay on the CPU.
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    deepspeed = import_deepspeed()
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def import_deepspeed() -> Any:
    """DeepSpeed without what it says at every step and compiles at the start."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", message="`torch.", category=FutureWarning)
    warnings.filterwarnings("ignore", message="`torch.", category=DeprecationWarning)
    import deepspeed

    # On CPU ranks it would compile collectives of its own for a minute: gloo has them.
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    return deepspeed


def make_engine(seed: int, args: argparse.Namespace, ranks: Ranks) -> Any:
    """A DeepSpeed engine on a small network."""
    import deepspeed

    config = json.loads(Path(args.config).read_text())
    config["train_micro_batch_size_per_gpu"] = -(-args.batch_size // ranks.size)
    if args.lr is not None:
        config["optimizer"]["params"]["lr"] = args.lr
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    engine, *_ = deepspeed.initialize(
        model=network, model_parameters=list(network.parameters()), config=config
    )
    return engine


def train(
    method: str, seed: int, args: argparse.Namespace, data: Data, ranks: Ranks
) -> list[Epoch]:
    """Trains one network; the measurements after each epoch."""
    engine = make_engine(seed, args, ranks)
    if method == "upgrad":
        # norm_eps=0: by default UPGrad turns into the mean when gradients become small.
        weighting = UPGradWeighting(projector=AutomaticProjector(norm_eps=0.0))
        jddist.attach(engine, weighting=weighting, batch_dim=0)
    criterion = nn.CrossEntropyLoss(reduction="none")
    shuffle = torch.Generator().manual_seed(seed)
    dtype = next(engine.module.parameters()).dtype
    train_x, test_x = data.train_x.to(dtype), data.test_x.to(dtype)
    epochs = []
    for number in range(1, args.epochs + 1):
        start = ranks.clock()
        order = torch.randperm(TRAINING_IMAGES, generator=shuffle)
        for indices in order.split(args.batch_size):
            mine = ranks.part(indices).to(ranks.device)
            losses = criterion(engine(train_x[mine]), data.train_y[mine])
            if method == "upgrad":
                engine.backward(losses)
            else:
                engine.backward(losses.sum() * ranks.size / len(indices))
            engine.step()
        seconds = ranks.clock() - start
        with torch.no_grad():
            loss = criterion(engine(train_x), data.train_y).mean()
            hits = engine(test_x).argmax(dim=1) == data.test_y
        epochs.append(
            Epoch(
                method=method,
                ranks=ranks.size,
                seed=seed,
                lr=engine.get_lr()[0],
                epoch=number,
                train_loss=float(loss),
                test_accuracy=float(hits.double().mean()),
                seconds=seconds,
            )
        )
    return epochs


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    """Trains both methods on the ranks that are there, and reports."""
    data = load_data(ranks.device)
    report = Report(Path(args.out), writes=ranks.rank == 0)
    for method in args.method:
        for seed in range(args.seeds):
            report.add(train(method, seed, args, data, ranks))
    if ranks.rank == 0:
        report.print_table()
        report.plot_curves()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default=str(CONFIG), help="DeepSpeed's configuration")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="images over all ranks")
    parser.add_argument("--lr", type=float, help="instead of that of the configuration")
    parser.add_argument("--nproc", type=int, help="start this many ranks by torchrun")
    parser.add_argument("--out", default="runs/digits_deepspeed", help="where results go")
    parser.add_argument("--smoke", action="store_true", help="one seed, one epoch")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.seeds, args.epochs = 1, 1
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    if args.nproc is not None and not under_torchrun():
        torchrun(__file__, args.nproc, sys.argv[1:])
        return
    ranks = start_ranks()
    try:
        run(args, ranks)
    finally:
        leave_ranks()


if __name__ == "__main__":
    main()
