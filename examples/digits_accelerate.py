"""Every sample of scikit-learn's digits is an objective, by Hugging Face Accelerate.

The loop is an ordinary Accelerate loop, with `jddist.integrations.accelerate.backward` in the place
of `accelerator.backward`. The mean of the losses is trained for comparison.

    python examples/digits_accelerate.py --nproc 2
    torchrun --standalone --nproc-per-node 2 examples/digits_accelerate.py
"""

from __future__ import annotations

import argparse
import time

import torch
from _digits_frameworks import make_network, measure, parse, per_rank, relaunched, report, upgrad
from _digits_report import Epoch
from _ranks import leave_ranks, start_ranks
from accelerate import Accelerator
from digits import Data, load_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from jddist.autogram import Engine
from jddist.integrations.accelerate import backward


def train(
    method: str, data: Data, accelerator: Accelerator, args: argparse.Namespace
) -> list[Epoch]:
    network = make_network(args.seed)
    ranks = accelerator.num_processes
    model, optimizer, loader = accelerator.prepare(
        network,
        torch.optim.SGD(network.parameters(), lr=args.lr),
        DataLoader(
            TensorDataset(data.train_x, data.train_y),
            batch_size=per_rank(args.batch_size, ranks),
            shuffle=True,
        ),
    )
    engine, weighting = Engine(model, batch_dim=0), upgrad()
    criterion = nn.CrossEntropyLoss(reduction="none")
    epochs = []
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        for x, y in loader:
            losses = criterion(model(x), y)  # one objective per image
            if method == "upgrad":
                backward(accelerator, engine, losses, weighting)
            else:
                accelerator.backward(losses.mean())
            accelerator.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - start
        inner = accelerator.unwrap_model(model)
        epochs.append(
            measure(
                inner, data, method=method, ranks=ranks, epoch=epoch, seconds=seconds, args=args
            )
        )
    return epochs


def main() -> None:
    args = parse(__doc__, "digits_accelerate")
    if relaunched(__file__, args):
        return
    device = start_ranks().device
    try:
        accelerator = Accelerator(cpu=device.type == "cpu")
        data = load_data(accelerator.device)
        epochs = [e for method in args.method for e in train(method, data, accelerator, args)]
        report(epochs, args.out, writes=accelerator.is_main_process)
    finally:
        leave_ranks()


if __name__ == "__main__":
    main()
