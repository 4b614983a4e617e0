"""Every sample of scikit-learn's digits is an objective, by Transformers' Trainer.

`JacobianDescentTrainer` wraps the model, logs and saves as any Trainer; by default its objectives
are the cross-entropies of the samples. The mean of the losses is trained for comparison.

    python examples/digits_trainer.py --nproc 2
    torchrun --standalone --nproc-per-node 2 examples/digits_trainer.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _digits_frameworks import make_network, measure, parse, per_rank, relaunched, report, upgrad
from _digits_report import Epoch
from _ranks import leave_ranks, start_ranks
from digits import Data, load_data
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from jddist.integrations.transformers import JacobianDescentTrainer


class Model(nn.Module):
    """The network with the arguments and results of a classifier of Transformers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.network = make_network(seed)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.network(pixels)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Digits(Dataset[dict[str, Tensor]]):
    def __init__(self, data: Data) -> None:
        self.x, self.y = data.train_x.cpu(), data.train_y.cpu()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixels": self.x[index], "labels": self.y[index]}


class Measures(TrainerCallback):
    """The report's line of each epoch."""

    def __init__(self, method: str, data: Data, ranks: int, args: argparse.Namespace) -> None:
        self.method, self.data, self.ranks, self.args = method, data, ranks, args
        self.epochs: list[Epoch] = []
        self.start = 0.0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, *args: Any, model: Model, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self.start
        self.epochs.append(
            measure(
                model.network,
                self.data,
                method=self.method,
                ranks=self.ranks,
                epoch=len(self.epochs) + 1,
                seconds=seconds,
                args=self.args,
            )
        )


def train(method: str, data: Data, ranks: int, args: argparse.Namespace) -> list[Epoch]:
    model = Model(args.seed)
    arguments = TrainingArguments(
        output_dir=str(Path(args.out) / method),
        per_device_train_batch_size=per_rank(args.batch_size, ranks),
        num_train_epochs=args.epochs,
        max_grad_norm=10.0,
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        use_cpu=data.train_x.device.type == "cpu",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    measures = Measures(method, data, ranks, args)
    options: dict[str, Any] = {
        "train_dataset": Digits(data),
        "optimizers": (optimizer, schedule),
        "callbacks": [measures],
    }
    if method == "upgrad":
        JacobianDescentTrainer(model, arguments, weighting=upgrad(), **options).train()
    else:
        Trainer(model, arguments, **options).train()
    return measures.epochs


def main() -> None:
    args = parse(__doc__, "digits_trainer")
    if relaunched(__file__, args):
        return
    ranks = start_ranks()
    try:
        data = load_data(ranks.device)
        epochs = [e for method in args.method for e in train(method, data, ranks.size, args)]
        report(epochs, args.out, writes=ranks.rank == 0)
    finally:
        leave_ranks()


if __name__ == "__main__":
    main()
