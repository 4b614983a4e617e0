"""Tensor-parallel layers in all the ways in which they are laid out: exact, and by closed forms.

The bound is rounding in float64, of a few hundred terms.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from jddist import verify
from jddist.aggregation import UPGradWeighting
from jddist.autogram import Engine
from tests._oracle import gramian as oracle_gramian
from tests._oracle import relative_error
from tests._ranks import run_ranks
from tests.distributed._sharded import assign, rows_of, whole_gradients, whole_parameters
from tests.distributed._tensor_parallel import columns, rows
from tests.distributed._training import OPTIMIZERS, upgrad_for

BOUND = 1e-12
BATCH, LENGTH, WIDTH, WORDS = 5, 4, 8, 11


class Scale(nn.Module):
    """A layer without a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Gated(nn.Module):
    """A layer without a closed form around layers that are parallelized."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.mlp = Mlp(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x * self.gate)


class Mlp(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 6, bias=bias)
        self.down = nn.Linear(6, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Sentences(nn.Module):
    """Words in, a number for each of them out."""

    def __init__(self, middle: nn.Module, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.norm = nn.LayerNorm(WIDTH)
        self.middle = middle
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.words(tokens)
        return self.head(hidden + self.middle(self.norm(hidden)))


@dataclass(frozen=True)
class Layout:
    """A model, how it is parallelized, and which of its parameters have no closed form."""

    make: Callable[[], nn.Module]
    plan: dict[str, Any]
    slow: str = ""


def _mlp(bias: bool = True) -> Sentences:
    return Sentences(Mlp(bias))


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "plain beside": lambda: Layout(
        _mlp, {"middle.up": ColwiseParallel(), "middle.down": RowwiseParallel()}
    ),
    "no bias": lambda: Layout(
        lambda: _mlp(False), {"middle.up": ColwiseParallel(), "middle.down": RowwiseParallel()}
    ),
    "DTensors between": lambda: Layout(
        _mlp,
        {
            "middle.up": ColwiseParallel(use_local_output=False),
            "middle.down": RowwiseParallel(use_local_output=False),
            "middle": PrepareModuleOutput(
                output_layouts=Replicate(), desired_output_layouts=Replicate()
            ),
        },
    ),
    "whole activations": lambda: Layout(_mlp, {"middle.up": rows(), "middle.down": columns()}),
    "one layer": lambda: Layout(_mlp, {"middle.down": columns()}),
    "prepared inputs": lambda: Layout(
        _mlp,
        {
            "middle": PrepareModuleInput(
                input_layouts=Replicate(), desired_input_layouts=Replicate()
            ),
            "middle.up": ColwiseParallel(),
            "middle.down": RowwiseParallel(),
        },
    ),
    "tied words": lambda: Layout(
        lambda: Sentences(Mlp(True), tied=True),
        {"words": RowwiseParallel(input_layouts=Replicate()), "head": columns()},
    ),
    "columns of words": lambda: Layout(_mlp, {"words": columns(), "head": rows()}),
    "sequence parallel": lambda: Layout(
        _mlp,
        {
            "words": RowwiseParallel(
                input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False
            ),
            "norm": SequenceParallel(),
            "middle": PrepareModuleInputOutput(
                input_layouts=Shard(1),
                desired_input_layouts=Replicate(),
                output_layouts=Shard(1),
                desired_output_layouts=Shard(1),
                use_local_output=False,
            ),
            "middle.up": ColwiseParallel(),
            "middle.down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        },
    ),
    "no closed form": lambda: Layout(
        lambda: Sentences(nn.Sequential(Scale(), Mlp(True))),
        {"middle.1.up": ColwiseParallel(), "middle.1.down": RowwiseParallel()},
    ),
    "no closed form around": lambda: Layout(
        lambda: Sentences(Gated(True)),
        {"middle.mlp.up": ColwiseParallel(), "middle.mlp.down": RowwiseParallel()},
        slow="middle.gate",
    ),
    "DTensor objectives": lambda: Layout(
        _mlp,
        {"head": ColwiseParallel(output_layouts=Replicate(), use_local_output=False)},
    ),
}


def _tokens() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, WORDS, (BATCH, LENGTH), generator=generator)


# Objectives of a sentence's words [b, t, WORDS]: a number each; two each; tasks.
OBJECTIVES: dict[str, tuple[int | None, Callable[[Tensor], Tensor]]] = {
    "instance": (0, lambda out: out.pow(2).sum(dim=(1, 2))),
    "instance x task": (0, lambda out: out[:, :, :2].pow(2).sum(dim=1)),
    "task": (None, lambda out: out.pow(2).mean(dim=(0, 1))[:4]),
}


def _make(layout: Layout, mesh: DeviceMesh) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(5)
    alone = layout.make().double()
    model = copy.deepcopy(alone)
    parallelize_module(model, mesh, layout.plan)
    if isinstance(alone, Sentences) and alone.head.weight is alone.words.weight:
        model.head.weight = model.words.weight  # type: ignore[union-attr]
    return model, alone


def _errors(layout: Layout, mesh: DeviceMesh, objective: str) -> dict[str, Any]:
    model, alone = _make(layout, mesh)
    batch_dim, of = OBJECTIVES[objective]
    engine, tokens = Engine(model, batch_dim=batch_dim), _tokens()
    expected = of(alone(tokens))
    weights = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64).view_as(expected)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = of(model(tokens))
        gramian = engine.compute_gramian(losses)
        losses.backward(engine.local_weights(weights))
        own = whole_gradients(model, placed=False)
        model.zero_grad()
        found = engine.backward(of(model(tokens)), upgrad_for(expected))
        errors = verify(model, lambda: of(model(tokens)), batch_dim=batch_dim)
    rows_alone = rows_of(expected, alone)
    used = UPGradWeighting()(rows_alone @ rows_alone.T)
    return {
        "gramian": relative_error(gramian, oracle_gramian(expected, alone.parameters())),
        "own loop": relative_error(own, weights.flatten() @ rows_alone),
        "backward": relative_error(whole_gradients(model), used @ rows_alone),
        "weights": relative_error(found.flatten(), used),
        "verify": max(errors.values()),
        "bits": [gramian, found],
        "warned": [str(w.message).split(":")[0] for w in caught],
    }


def _all_layouts(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    mesh = init_device_mesh("cpu", (world_size,))
    return {
        f"{name} | {objective}": _errors(layout(), mesh, objective)
        for name, layout in LAYOUTS.items()
        for objective in OBJECTIVES
    }


def test_every_layout_is_exact() -> None:
    ranks = run_ranks(_all_layouts, 2, timeout=60.0)
    first = {case: results["bits"] for case, results in ranks[0].items()}
    for found in ranks:
        assert found.keys() == ranks[0].keys()
        for case, results in found.items():
            bits = zip(results.pop("bits"), first[case], strict=True)
            assert all(torch.equal(a, b) for a, b in bits), case
            warned = results.pop("warned")
            assert max(results.values()) <= BOUND, (case, results)
            slow = LAYOUTS[case.split(" | ")[0]]().slow
            if slow and not case.endswith("| task"):
                assert warned and all(slow in text for text in warned), case
            else:
                assert warned == [], case


def _accumulated(rank: int, world_size: int) -> list[float]:
    """Micro-batches that join one Gramian, and less lines of weights than ranks."""
    mesh = init_device_mesh("cpu", (world_size,))
    layout = Layout(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 4)), {})
    layout.plan.update({"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()})
    model, alone = _make(layout, mesh)
    engine = Engine(model, batch_dim=0)
    opt, reference = (OPTIMIZERS["sgd"](list(m.parameters())) for m in (model, alone))
    x = torch.linspace(-1.0, 1.0, 21, dtype=torch.float64).view(7, 3)
    errors, weighting = [], UPGradWeighting()
    for _ in range(3):
        with engine.accumulate() as accumulation:
            for part in x.split(4):
                engine.backward(model(part).pow(2).sum(dim=1), weighting)
        rows_alone = rows_of(alone(x).pow(2).sum(dim=1), alone)
        weights = UPGradWeighting()(rows_alone @ rows_alone.T)
        assert accumulation.weights is not None
        errors.append(relative_error(accumulation.weights, weights))
        assign(alone, weights @ rows_alone)
        for optimizer in (opt, reference):
            optimizer.step()
            optimizer.zero_grad()
        errors.append(relative_error(whole_parameters(model), whole_parameters(alone)))
    return errors


def test_micro_batches_join_one_gramian() -> None:
    for errors in run_ranks(_accumulated, 3):
        assert max(errors) <= BOUND


def _narrow(rank: int, world_size: int) -> list[float]:
    mesh = init_device_mesh("cpu", (world_size,))
    layout = LAYOUTS["tied words"]()
    model, alone = _make(layout, mesh)
    model.bfloat16()
    engine = Engine(model, batch_dim=0)
    of = OBJECTIVES["instance"][1]
    gramian = engine.compute_gramian(of(model(_tokens()).float()))
    assert not any(isinstance(p, DTensor) and p.dtype != torch.bfloat16 for p in model.parameters())
    return [relative_error(gramian, oracle_gramian(of(alone(_tokens())), alone.parameters()))]


def test_bfloat16_parameters() -> None:
    """8 bits: roundings of 0.4 % each, averaged over some hundred terms."""
    for errors in run_ranks(_narrow, 2):
        assert 1e-5 < max(errors) <= 3e-2
