"""Who reads a parameter, how often and from where: ties, repeated calls, parents, functions."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Batch, Case, normal, on_x, per_sample


class _CalledThreeTimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.inner(x).tanh()
        out: Tensor = self.head(x)
        return out


class _CalledWithTwoShapes(nn.Module):
    """One Linear on [b, d] and on [b, t, d]: its calls have different numbers of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.shared(x).tanh()
        pooled = self.shared(x.mean(1))
        return torch.cat([positions.mean(1), pooled, positions[:, 0] * pooled], dim=1)


class _TiedLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh())
        return out


class _OneModuleTwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.decoder = nn.Sequential(self.encoder[0], nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.encoder(x))
        return out


class _TiedAutoencoder(nn.Module):
    """The decoder reads the encoder's weight, transposed, without a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encoder(x).tanh(), self.encoder.weight.T)


class _Functional(nn.Module):
    """The child is never called: only its parameters are read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.addmm(self.linear.bias, x, self.linear.weight.T).tanh())
        return out


class _ParameterList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.randn(6)) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = (x * scale).sin()
        out: Tensor = self.head(x)
        return out


class _ParentParameters(nn.Module):
    """Direct parameters used before, between and after the children."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.randn(6))
        self.first = nn.Linear(6, 5)
        self.between = nn.Parameter(torch.randn(5, 5))
        self.second = nn.Linear(5, 3)
        self.after = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x * self.before).tanh() @ self.between
        return (self.second(hidden) + self.after).sin() * self.after


class _NestedParents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(1))
        self.blocks = nn.ModuleList(_ParentParameters() for _ in range(2))
        self.widen = nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.widen(self.blocks[0](x)) * self.gain
        out: Tensor = self.blocks[1](hidden)
        return out


class _RootScale(nn.Module):
    """A free scalar on the root, read inside its forward or by the loss outside of it."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out * self.scale if self.inside else out


def _scaled_outside(model: nn.Module, batch: Batch) -> Tensor:
    scale = model.scale
    assert isinstance(scale, Tensor)
    return per_sample(model(batch["x"])) * scale.exp()


class _Frozen(nn.Module):
    """A frozen weight with a trained bias, the reverse, and a whole frozen layer in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.middle = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 3)
        self.first.weight.requires_grad_(False)
        self.middle.requires_grad_(False)
        self.norm.bias.requires_grad_(False)
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.middle(self.first(x).tanh())).sin())
        return out


class _Unused(nn.Module):
    """A layer that is never called, one whose output is dropped, and a parameter nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 4)
        self.never = nn.Linear(3, 3)
        self.dropped = nn.Linear(4, 4)
        self.spare = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.used(x).tanh()
        self.dropped(hidden)
        return hidden


class _NoGradCall(nn.Module):
    """One layer called with and without a graph, as for a target network or a stopped gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.layer(x)
        return self.layer(x) * target + self.layer(x.cos()).detach()


class _ScaledLinear(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).square() + 0.5 * self.bias


def _subclass() -> nn.Module:
    return nn.Sequential(_ScaledLinear(6, 4), nn.Tanh(), nn.Linear(4, 2))


def _weight_norm() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    return nn.Sequential(normed, nn.Tanh(), nn.Linear(5, 2))


def _weight_norm_by_hook(convolution: bool) -> nn.Module:
    layers: list[nn.Module] = [nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 5, 3), nn.Flatten()]
    if not convolution:
        layers = [nn.Linear(6, 5)]
    with warnings.catch_warnings():
        # torch has deprecated it; models that use it still have to be right.
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layers[len(layers) // 2])
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(5, 2))


SHARING = [
    Case("called_three_times", _CalledThreeTimes, normal(6), on_x),
    Case("called_with_two_shapes", _CalledWithTwoShapes, normal(3, 6), on_x),
    Case("tied_linears", _TiedLinears, normal(6), on_x),
    Case("one_module_two_names", _OneModuleTwoNames, normal(6), on_x),
    Case("tied_autoencoder", _TiedAutoencoder, normal(6), on_x, announced=True),
    Case("functional", _Functional, normal(6), on_x, announced=True),
    Case("parameter_list", _ParameterList, normal(6), on_x, announced=True),
    Case("parent_parameters", _ParentParameters, normal(6), on_x),
    Case("nested_parents", _NestedParents, normal(6), on_x),
    Case("root_scale", lambda: _RootScale(True), normal(6), on_x),
    Case(
        "root_scale_in_loss", lambda: _RootScale(False), normal(6), _scaled_outside, announced=True
    ),
    Case("frozen_parameters", _Frozen, normal(6), on_x),
    Case("unused_parameters", _Unused, normal(6), on_x),
    Case("no_grad_call", _NoGradCall, normal(6), on_x),
    Case("linear_subclass", _subclass, normal(6), on_x),
    Case("weight_norm", _weight_norm, normal(6), on_x),
    *(
        Case(name, partial(_weight_norm_by_hook, is_conv), normal(6), on_x, announced=True)
        for name, is_conv in (("weight_norm_by_hook", False), ("conv_norm_by_hook", True))
    ),
]
