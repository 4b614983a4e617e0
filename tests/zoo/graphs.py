"""The shapes of forwards: branches, trees of tensors, unused outputs, checkpoints, noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .case import Batch, Case, normal, on_x, per_sample


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 5)
        self.left = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        self.right = nn.Linear(5, 3)
        self.join = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x).tanh()
        left, right = self.left(stem), self.right(stem)
        joined: Tensor = self.join(torch.cat([left * right, left + stem[:, :3]], dim=1))
        return joined


class _TwoInTwoOut(nn.Module):
    """Direct parameters between two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(4))
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x @ self.mix
        return self.linear(hidden + y), (hidden * y + self.bias).sin()


def _two_in_two_out(model: nn.Module, batch: Batch) -> Tensor:
    return per_sample(*model(batch["x"], y=batch["y"]))


def _pair(size: int, generator: torch.Generator) -> Batch:
    return {**normal(6)(size, generator), **normal(4, name="y")(size, generator)}


class _Tree(nn.Module):
    """A module with direct parameters whose inputs and outputs are trees, not only of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, inputs: dict[str, Any], *, scales: list[float], mode: str) -> dict[str, Any]:
        assert mode == "sum" and inputs["nothing"] is None
        x, (y, factor) = inputs["x"], inputs["nested"]
        hidden = x @ self.weight * factor
        return {
            "first": hidden + y,
            "mode": mode,
            "rest": (None, [hidden.sin() * self.shift * scales[0]], x.sum(1)),
        }


class _TreeModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.tree = _Tree()
        self.head = nn.Linear(4, 2)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {"x": self.stem(batch["x"]), "nested": (batch["y"], 2.0), "nothing": None}
        out = self.tree(inputs, scales=[0.5], mode="sum")
        return self.head(out["first"]), {"second": out["rest"][1][0], "third": out["rest"][2]}


def _tree_losses(model: nn.Module, batch: Batch) -> Tensor:
    first, rest = model(batch)
    return per_sample(first, rest["second"], rest["third"])


class _UnusedOutput(nn.Module):
    """One of the outputs of a module with direct parameters is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = _TwoInTwoOut()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        second: Tensor = self.pair(x, y)[1]
        return second


class _OutputUsedInPart(nn.Module):
    """The frozen branch of an output has no graph at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = x @ self.weight
        return x * 2.0, hidden.detach(), hidden


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Tanh(), _Scale(6), nn.Linear(6, 6)) for _ in range(2)
        )
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        out: Tensor = self.head(x)
        return out


class _Scale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class _Noisy(nn.Module):
    """Direct parameters and random numbers in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))
        self.dropout = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x @ self.weight).sin() @ self.weight.T


def _noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), _Noisy(), _Noisy(), nn.Linear(6, 2))


class _Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("offset", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.offset, Tensor)
        return (x @ self.weight + self.offset).tanh()


def _two_tasks(model: nn.Module, batch: Batch) -> Tensor:
    first, second = model(batch["x"], y=batch["y"])
    return torch.stack([per_sample(first), per_sample(second), per_sample(first * 2)], dim=1)


GRAPHS = [
    Case("branches", _Branches, normal(6), on_x),
    Case("two_inputs_two_outputs", _TwoInTwoOut, _pair, _two_in_two_out),
    Case("multi_task", _TwoInTwoOut, _pair, _two_tasks),
    Case("trees", _TreeModel, _pair, _tree_losses),
    Case(
        "unused_output",
        _UnusedOutput,
        _pair,
        lambda model, batch: per_sample(model(batch["x"], batch["y"])),
    ),
    Case(
        "outputs_without_graph",
        _OutputUsedInPart,
        normal(6),
        lambda model, batch: per_sample(*model(batch["x"])),
    ),
    Case("checkpoint", _Checkpointed, normal(6), on_x),
    Case("direct_parameters_and_dropout", _noisy, normal(6), on_x, random=True),
    Case("buffered", _Buffered, normal(6), on_x),
]
