"""What the multi-rank tests train: small models on one batch, and the brute-force reference.

Each reference is one process in float64 that forms the whole Jacobian row by row, weighs its
Gramian, and steps the same optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jddist.aggregation import Flattening, UPGradWeighting
from tests._oracle import jacobian
from tests._ranks import split_sizes

SAMPLES, FEATURES, TASKS, STEPS = 9, 5, 4, 5

OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


class Network(nn.Module):
    """Dense layers, a norm, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 6)
        self.norm = nn.LayerNorm(6)
        self.twice = nn.Linear(6, 6)
        self.last = nn.Linear(6, TASKS)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(hidden)))))


def make_network() -> Network:
    torch.manual_seed(0)
    return Network().double()


def make_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    y = torch.randn(SAMPLES, TASKS, generator=generator, dtype=torch.float64)
    return x, y


def local_part(tensor: Tensor, rank: int, world_size: int, kind: str) -> Tensor:
    sizes = split_sizes(len(tensor), world_size, kind)
    start = sum(sizes[:rank])
    return tensor[start : start + sizes[rank]]


# Losses by name: from the network's output [b, TASKS] and the targets to the objectives.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "instance": lambda out, y: (out - y).pow(2).sum(dim=1),
    "instance x task": lambda out, y: (out - y).pow(2),
    "task x instance": lambda out, y: (out - y).pow(2).T,
    "task": lambda out, y: (out - y).pow(2).mean(dim=0),
    "task sum": lambda out, y: (out - y).pow(2).sum(dim=0),
}


def flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def parameters_of(model: nn.Module) -> Tensor:
    return flatten(list(model.parameters()))


def set_gradients(model: nn.Module, vector: Tensor) -> None:
    for p, part in zip(
        model.parameters(),
        vector.split([p.numel() for p in model.parameters()]),
        strict=True,
    ):
        p.grad = part.view_as(p).clone()


def reference(objective: str, optimizer: str) -> dict[str, list[Tensor]]:
    """Weights and parameters after each step of one process on the whole batch."""
    model, (x, y) = make_network(), make_data()
    opt = OPTIMIZERS[optimizer](list(model.parameters()))
    result: dict[str, list[Tensor]] = {"weights": [], "parameters": [], "gramians": []}
    for _ in range(STEPS):
        losses = LOSSES[objective](model(x), y)
        rows = jacobian(losses, list(model.parameters()))
        gramian = rows @ rows.T
        weights = UPGradWeighting()(gramian)
        set_gradients(model, weights @ rows)
        opt.step()
        result["gramians"].append(gramian)
        result["weights"].append(weights.view(losses.shape))
        result["parameters"].append(parameters_of(model))
    return result


def upgrad_for(losses: Tensor) -> Callable[[Tensor], Tensor]:
    return UPGradWeighting() if losses.ndim == 1 else Flattening(UPGradWeighting())


def wrap(model: nn.Module, **options: bool) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # DDP looks into its own buffers' deprecated types with some options.
        warnings.simplefilter("ignore")
        return DistributedDataParallel(model, **options)
