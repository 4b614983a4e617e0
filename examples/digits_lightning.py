"""Every sample of scikit-learn's digits is an objective, by Lightning's manual optimization.

The `JacobianDescent` callback makes the engine, and `backward(self, losses)` in `training_step`
takes the step, whatever the strategy. The mean of the losses is trained for comparison.

    python examples/digits_lightning.py --nproc 2
    torchrun --standalone --nproc-per-node 2 examples/digits_lightning.py
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings

import torch
from _digits_frameworks import make_network, measure, parse, per_rank, relaunched, report, upgrad
from _digits_report import Epoch
from _ranks import leave_ranks, start_ranks
from digits import Data, load_data
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from jddist.integrations.lightning import JacobianDescent, backward


class Digits(LightningModule):
    def __init__(self, method: str, data: Data, args: argparse.Namespace) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = make_network(args.seed)
        self.method, self.data, self.args = method, data, args
        self.epochs: list[Epoch] = []
        self.start = 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.args.lr)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        losses = nn.functional.cross_entropy(self.network(x), y, reduction="none")
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if self.method == "upgrad":
            backward(self, losses)
        else:
            self.manual_backward(losses.mean())
        self.clip_gradients(optimizer, 10.0, gradient_clip_algorithm="norm")
        optimizer.step()

    def on_train_epoch_start(self) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        self.epochs.append(
            measure(
                self.network,
                self.data,
                method=self.method,
                ranks=self.trainer.world_size,
                epoch=self.current_epoch + 1,
                seconds=time.perf_counter() - self.start,
                args=self.args,
            )
        )


def train(method: str, data: Data, ranks: int, args: argparse.Namespace) -> list[Epoch]:
    seed_everything(args.seed, verbose=False)
    module = Digits(method, data, args)
    loader = DataLoader(
        TensorDataset(data.train_x, data.train_y),
        batch_size=per_rank(args.batch_size, ranks),
        shuffle=True,
    )
    trainer = Trainer(
        accelerator=data.train_x.device.type,
        devices=ranks,
        strategy="ddp",
        max_epochs=args.epochs,
        callbacks=[JacobianDescent(upgrad(), batch_dim=0)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return module.epochs


def main() -> None:
    args = parse(__doc__, "digits_lightning")
    if relaunched(__file__, args):
        return
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    ranks = start_ranks()
    try:
        data = load_data(ranks.device)
        epochs = [e for method in args.method for e in train(method, data, ranks.size, args)]
        report(epochs, args.out, writes=ranks.rank == 0)
    finally:
        leave_ranks()


if __name__ == "__main__":
    main()
