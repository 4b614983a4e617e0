"""Four ranks train on scikit-learn's digits, and one of them does not play along.

Each rank is one objective: the mean loss on its own quarter of the images. The last rank sends

nothing wrong  its gradient, like the others;
scaled         -10 times its gradient;
noise          Gaussian noise of variance 200 instead of it.

Plain DistributedDataParallel averages the four gradients, so that the last rank steers. Krum and
TrimmedMean, through the communication hook, leave out what is far from most of the others.

    python examples/robust.py
    torchrun --standalone --nproc-per-node 4 examples/robust.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
from _ranks import Ranks, leave_ranks, start_ranks, torchrun, under_torchrun
from digits import TRAINING_IMAGES, Data, load_data
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from jddist.aggregation import Aggregator, Krum, TrimmedMean
from jddist.integrations.comm_hook import RankObjectives, rank_objectives_hook

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

DEFENCES: dict[str, Callable[[], Aggregator] | None] = {
    "plain DDP": None,
    "Krum": lambda: Krum(n_byzantine=1),
    "TrimmedMean": lambda: TrimmedMean(trim_number=1),
}
ATTACKS = ("nothing wrong", "scaled", "noise")
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"plain DDP": "#000000", "Krum": "#0072B2", "TrimmedMean": "#D55E00"}
SIGMA = 200**0.5  # for each parameter, as in the paper of Krum; gradients are far smaller
LEARNS, FAILS = 0.8, 0.5  # test accuracies; guessing has 0.1


@dataclass(frozen=True)
class Run:
    """What came of one defence under one attack: one line of ``metrics.jsonl``.

    Attributes:
        defence: How the ranks' gradients became one.
        attack: What the last rank sent.
        losses: The mean loss on all training images after each epoch.
        test_accuracy: The share of test images classified rightly in the end.
    """

    defence: str
    attack: str
    losses: list[float]
    test_accuracy: float


def misbehave(network: nn.Module, attack: str, seed: int) -> None:
    """Makes every gradient of this rank what the attack says, before DDP gets to see it."""
    generator = torch.Generator().manual_seed(seed)

    def scaled(gradient: Tensor) -> Tensor:
        return -10 * gradient

    def noise(gradient: Tensor) -> Tensor:
        drawn = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
        return SIGMA * drawn.to(gradient.device)

    for parameter in network.parameters():
        if attack != "nothing wrong":
            parameter.register_hook(scaled if attack == "scaled" else noise)


def train(defence: str, attack: str, args: argparse.Namespace, data: Data, ranks: Ranks) -> Run:
    torch.manual_seed(args.seed)
    layers = [nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)]
    network = nn.Sequential(*layers).double().to(ranks.device)
    if ranks.rank == ranks.size - 1:
        misbehave(network, attack, args.seed)
    ddp = DistributedDataParallel(network)
    make = DEFENCES[defence]
    if make is not None:
        ddp.register_comm_hook(RankObjectives(make()), rank_objectives_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=args.lr)
    mine = torch.arange(TRAINING_IMAGES).tensor_split(ranks.size)[ranks.rank]
    shuffle = torch.Generator().manual_seed(args.seed)
    losses = []
    for _ in range(args.epochs):
        order = mine[torch.randperm(len(mine), generator=shuffle)]
        for indices in order.split(args.batch_size // ranks.size):
            optimizer.zero_grad()
            out = ddp(data.train_x[indices])
            nn.functional.cross_entropy(out, data.train_y[indices]).backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(float(nn.functional.cross_entropy(network(data.train_x), data.train_y)))
    with torch.no_grad():
        hits = network(data.test_x).argmax(dim=1) == data.test_y
    return Run(defence, attack, losses, float(hits.double().mean()))


def table(runs: list[Run]) -> str:
    """One row per defence: final training loss and test accuracy under each attack."""
    lines = [f"| | {' | '.join(ATTACKS)} |", f"|---|{'---|' * len(ATTACKS)}"]
    for defence in DEFENCES:
        cells = [
            f"{run.losses[-1]:.3g}, {100 * run.test_accuracy:.1f} %"
            for attack in ATTACKS
            for run in runs
            if (run.defence, run.attack) == (defence, attack)
        ]
        lines.append(f"| {defence} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(runs: list[Run], path: Path) -> None:
    figure, panels = plt.subplots(1, len(ATTACKS), figsize=(11, 3.6), layout="constrained")
    for panel, attack in zip(panels, ATTACKS, strict=True):
        for run in runs:
            if run.attack == attack:
                epochs = range(1, len(run.losses) + 1)
                panel.plot(epochs, run.losses, color=COLOURS[run.defence], label=run.defence)
        panel.set_title(f"last rank: {attack}")
        panel.set_xlabel("epoch")
        panel.set_yscale("log")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("training loss")
    panels[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def check(runs: list[Run]) -> None:
    """Ends with an error unless exactly the undefended runs under attack fail to learn."""
    for run in runs:
        attacked = run.attack != "nothing wrong" and DEFENCES[run.defence] is None
        fits = run.test_accuracy <= FAILS if attacked else run.test_accuracy >= LEARNS
        if not fits:
            raise SystemExit(
                f"Found a test accuracy of {run.test_accuracy:.3f} by {run.defence} with the last "
                f"rank sending {run.attack}; expected it to "
                f"{'stay below' if attacked else 'reach'} {FAILS if attacked else LEARNS}"
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="images over all ranks")
    parser.add_argument("--lr", type=float, default=0.4, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc", type=int, default=4, help="ranks (4 or more) without torchrun")
    parser.add_argument("--out", default="runs/robust", help="where results go")
    parser.add_argument("--smoke", action="store_true", help="three epochs")
    args = parser.parse_args()
    if args.smoke:
        args.epochs = 3
    return args


def main() -> None:
    args = parse()
    if not under_torchrun():
        torchrun(__file__, args.nproc, sys.argv[1:])
        return
    ranks = start_ranks()
    try:
        if ranks.size < 4:
            raise SystemExit(f"found {ranks.size} ranks; expected 4 or more, of which one is bad")
        data = load_data(ranks.device)
        combinations = [(defence, attack) for attack in ATTACKS for defence in DEFENCES]
        progress = tqdm(combinations, disable=ranks.rank != 0, unit="run")
        runs = [train(defence, attack, args, data, ranks) for defence, attack in progress]
        if ranks.rank == 0:
            folder = Path(args.out)
            folder.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(asdict(run)) + "\n" for run in runs]
            (folder / "metrics.jsonl").write_text("".join(lines))
            plot(runs, folder / "robust.png")
            print(f"\nfinal training loss, test accuracy:\n\n{table(runs)}", flush=True)
            check(runs)
    finally:
        leave_ranks()


if __name__ == "__main__":
    main()
