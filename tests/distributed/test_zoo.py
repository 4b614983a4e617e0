"""The whole model zoo over ranks: the Gramian and the weighted gradient of one process."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from jddist.autogram import Engine
from tests._oracle import flat_grad, gramian, relative_error, weighted_gradient
from tests._ranks import run_ranks, split_sizes
from tests.cases import BY_NAME, CASES
from tests.unit.autogram._common import SLOW_WAY

SAMPLES = 6
# DDP itself cannot take a parameter that is read outside of the wrapper's forward.
OUTSIDE = {"root_scale_in_loss"}
NAMES = [
    case.name
    for case in CASES
    if case.batch_dim_ok and not case.random and case.name not in OUTSIDE
]


def _on_ranks(rank: int, world_size: int, kind: str, names: list[str]) -> dict[str, list[Tensor]]:
    found = {}
    for name in names:
        case = BY_NAME[name]
        model = case.model()
        sizes = split_sizes(SAMPLES, world_size, kind)
        batch = case.split(case.batch(SAMPLES), sizes)[rank]
        with warnings.catch_warnings():
            # Some cases take the slow way; some wrappers look at deprecated types in their buffers.
            warnings.filterwarnings("ignore", SLOW_WAY)
            ddp = DistributedDataParallel(model, find_unused_parameters=True)
            engine = Engine(ddp, batch_dim=0)
            losses = case.losses(ddp, batch)
            global_gramian = engine.compute_gramian(losses)
            weights = torch.linspace(1, 2, losses.shape[1:].numel() * SAMPLES).double()
            weights = weights.view(SAMPLES, *losses.shape[1:])
            losses.backward(engine.local_weights(weights))
        found[name] = [global_gramian, flat_grad(model.parameters())]
    return found


@pytest.mark.parametrize(("world_size", "kind"), [(2, "uneven"), (3, "even"), (4, "uneven")])
def test_zoo_over_ranks(world_size: int, kind: str) -> None:
    ranks = run_ranks(_on_ranks, world_size, kind, NAMES, timeout=240)
    for name in NAMES:
        case = BY_NAME[name]
        model = case.model()
        losses = case.losses(model, case.batch(SAMPLES))
        expected = gramian(losses, model.parameters())
        weights = torch.linspace(1, 2, losses.numel()).double().view_as(losses)
        gradient = weighted_gradient(losses, weights, model.parameters())
        for found in ranks:
            assert relative_error(found[name][0], expected) <= case.tolerance, name
            assert relative_error(found[name][1], gradient) <= case.tolerance, name
