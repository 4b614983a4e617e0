"""What breaks assumptions: views changed in place, other layouts of samples, what vmap refuses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .case import Batch, Case, normal, on_x, per_sample


class _Views(nn.Module):
    """A layer's output is changed in place through a view, after and before other uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden[:, :3].mul_(2.0)
        left, right = self.second(hidden).chunk(2, dim=1)
        return left.tanh() * right


class _ReturnsViews(nn.Module):
    """A module with direct parameters that returns views, one of which is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x @ self.weight
        return hidden[:, :2], hidden[:, 1:].unsqueeze(2)


def _views_losses(model: nn.Module, batch: Batch) -> Tensor:
    left, right = model(batch["x"])
    return per_sample(left * 3.0, right.mul(2.0))


class _ReturnsOneView(nn.Module):
    """A layer whose result is transposed by its parent and then changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapped = nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (2, 2)))
        self.scale = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        grid: Tensor = self.wrapped(x).transpose(1, 2)
        grid.mul_(3.0)
        return grid * self.scale


class _DataDependent(nn.Module):
    """Python looks at each sample's values, which vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        rows = [row * self.scale * (2.0 if float(row.sum()) > 0 else 0.5) for row in x]
        return torch.stack(rows) if rows else x * self.scale


class _Cube(torch.autograd.Function):
    """No rule for vmap, neither forward nor backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class _CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Cube.apply(x @ self.weight)
        return out


def _cube_between() -> nn.Module:
    """The function lies between the layers: only the first pass meets it."""

    class _Apply(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = _Cube.apply(x)
            return out

    return nn.Sequential(nn.Linear(6, 4), _Apply(), nn.Linear(4, 3))


class _Transposed(nn.Module):
    """Returns a transposed view, which the next layer changes in place: what is left of it in the
    graph is its base, whose gradient has other strides."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).transpose(1, 2)


def _transposed_in_place() -> nn.Module:
    return nn.Sequential(_Transposed(), nn.ReLU(inplace=True), nn.Linear(3, 2))


class _FlattenedPositions(nn.Module):
    """Batch and positions are one dimension while the layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x.reshape(-1, 6)).tanh()
        out: Tensor = self.head(hidden.reshape(x.shape[0], x.shape[1], 4).sum(1))
        return out


class _PositionsFirst(nn.Module):
    """The samples are in dimension 1 while the layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.inner(x.transpose(0, 1)).tanh()
        return hidden.transpose(0, 1)


class _EmptyCall(nn.Module):
    """A layer may be called without samples, as an expert that nobody chose."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen = nn.Linear(6, 4)
        self.expert = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.chosen(x), self.expert(x[:0])])


AWKWARD = [
    Case("views_in_place", _Views, normal(6), on_x),
    Case("returns_views", _ReturnsViews, normal(6), _views_losses),
    Case("view_changed_in_place", _ReturnsOneView, normal(6), on_x),
    Case("transposed_in_place", _transposed_in_place, normal(3, 6), on_x),
    Case("data_dependent", _DataDependent, normal(6), on_x, announced=True),
    Case("custom_function", _CustomFunction, normal(6), on_x, announced=True),
    Case("custom_function_between", _cube_between, normal(6), on_x),
    Case("empty_call", _EmptyCall, normal(6), on_x, announced=True),
    Case("flattened_positions", _FlattenedPositions, normal(3, 6), on_x, announced=True),
    Case("positions_first", _PositionsFirst, normal(3, 6), on_x, announced=True),
    # As many positions as samples in the tests' batch of 5: sizes cannot tell them apart.
    Case("positions_first_square", _PositionsFirst, normal(5, 6), on_x, announced=True),
]
