"""Instance-wise risk minimisation of a Llama in `fully_shard`: every sequence is an objective.

Transformers' Llama, with random weights and tied embeddings, learns the characters of the
docstrings of Python's library. Of each step's sequences, spread over the ranks, `engine.backward`
takes the Gramian of all their losses (each the mean over its characters), weighs it by UPGrad on
rank 0, and leaves the weighted gradient in the shards' `.grad`, for clipping and AdamW as ever. The
mean, by the same way and with the same learning rates, stands beside it. Nothing is downloaded.

    torchrun --standalone --nproc-per-node 2 examples/llama_iwrm_fsdp.py
    python examples/llama_iwrm_fsdp.py --nproc 2                          # the same
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _llama_report import Report, Run
from _llama_text import CHARACTERS, load_sequences
from _ranks import Ranks, leave_ranks, start_ranks, torchrun, under_torchrun
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from jddist.aggregation import MeanWeighting, UPGradWeighting
from jddist.autogram import Engine
from jddist.linalg import AutomaticProjector

LENGTH = 48
# norm_eps=0: by default UPGrad turns into the mean when gradients become small.
METHODS: dict[str, Callable[[], nn.Module]] = {
    "mean": MeanWeighting,
    "upgrad": lambda: UPGradWeighting(projector=AutomaticProjector(norm_eps=0.0)),
}


def make_model(seed: int, ranks: Ranks) -> nn.Module:
    """The same model on any number of ranks; sharded if there are several."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise SystemExit(
            "Found no transformers; expected it for the model. Install it by "
            'pip install "jddist[transformers]".'
        ) from error
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(ranks.device)
    if ranks.size > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)  # the embeddings stay together with the head that they are tied to
    return model


def losses_of(model: nn.Module, sequences: Tensor) -> Tensor:
    """The loss of each sequence: the mean over its characters, in nats."""
    logits = model(input_ids=sequences[:, :-1]).logits
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none")
    return losses.mean(dim=1)


def conflicts(gramian: Tensor) -> float:
    """The share of pairs of different sequences whose gradients point away from each other."""
    m = len(gramian)
    return float((gramian < 0).sum()) / (m * (m - 1))


def train(
    method: str,
    lr: float,
    seed: int,
    args: argparse.Namespace,
    data: tuple[Tensor, Tensor],
    ranks: Ranks,
    bar: tqdm,
) -> Run:
    """Trains one model, and measures it."""
    training, validation = data
    model = make_model(seed, ranks)
    engine = Engine(model, batch_dim=0)
    weighting = METHODS[method]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
    steps = order[: args.steps * args.batch_size].split(args.batch_size)
    losses, shares = [], []
    start = ranks.clock()
    for indices in steps:
        mine = training[ranks.part(indices)].to(ranks.device)
        own = losses_of(model, mine)
        gramian = torch.empty(0)

        def weigh(matrix: Tensor) -> Tensor:
            nonlocal gramian
            gramian = matrix  # only rank 0, which reports, comes here
            return weighting(matrix)

        optimizer.zero_grad()
        engine.backward(own, weigh)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(ranks.sum(own.detach().sum())) / len(indices))
        if ranks.rank == 0:
            shares.append(conflicts(gramian))
        bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
        bar.update()
    seconds = (ranks.clock() - start) / len(steps)
    return Run(
        method, ranks.size, lr, seed, losses, shares, evaluate(model, validation, ranks), seconds
    )


@torch.no_grad()
def evaluate(model: nn.Module, sequences: Tensor, ranks: Ranks) -> list[float]:
    """The loss of every sequence."""
    sizes = [len(part) for part in torch.arange(len(sequences)).tensor_split(ranks.size)]
    found = torch.zeros(len(sequences), device=ranks.device)
    start = sum(sizes[: ranks.rank])
    mine = ranks.part(sequences).to(ranks.device)
    found[start : start + len(mine)] = losses_of(model, mine)
    return ranks.sum(found).tolist()


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    """Trains by all methods, learning rates and seeds, and reports."""
    training, validation = load_sequences(LENGTH)
    data = (training, validation[: args.validation])
    report = Report(Path(args.out), writes=ranks.rank == 0)
    total = len(METHODS) * len(args.lr) * args.seeds * args.steps
    with tqdm(total=total, disable=ranks.rank != 0, unit="step") as bar:
        for method in METHODS:
            for lr in args.lr:
                for seed in range(args.seeds):
                    bar.set_description(f"{method}, rate {lr:g}, seed {seed}")
                    report.add(train(method, lr, seed, args, data, ranks, bar))
    if ranks.rank == 0:
        report.print_table()
        report.plot()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150, help="steps of each training")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences over all ranks")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.0015, 0.003])
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--validation", type=int, default=512, help="sequences for validation")
    parser.add_argument("--nproc", type=int, default=2, help="without torchrun: how many ranks")
    parser.add_argument("--out", default="runs/llama_iwrm_fsdp", help="where results go")
    parser.add_argument("--smoke", action="store_true", help="20 steps with one learning rate")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.steps, args.lr, args.seeds, args.validation = 20, [0.003], 1, 64
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    if not under_torchrun():
        torchrun(__file__, args.nproc, sys.argv[1:])
        return
    ranks = start_ranks()
    try:
        run(args, ranks)
    finally:
        leave_ranks()


if __name__ == "__main__":
    main()
