"""Every scheme of exchange gives the Gramian and the gradient of one process, any way of splitting.

The bound is for float64: sums of a few thousand products in another order stay near 1e-15.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jddist.autogram import Engine
from jddist.distribution import Scheme
from jddist.errors import LayoutMismatchError
from tests._oracle import flat_grad, gramian, relative_error, weighted_gradient
from tests._ranks import run_ranks, split_sizes
from tests.distributed._exchanged import MODELS, inputs, make, only
from tests.distributed._spy import spying
from tests.distributed._training import wrap

BOUND = 1e-12
SAMPLES = 6
SCHEMES = {"planned": None, **{s.value: s for s in (Scheme.FACTORS, Scheme.FEATURES, Scheme.ROWS)}}
KINDS = ["even", "uneven", "empty"]
OBJECTIVES = [1, 3]
CASES = [(name, scheme, k) for name in MODELS for scheme in SCHEMES for k in OBJECTIVES]


def losses_of(output: Tensor, k: int) -> Tensor:
    """[b, 10] -> [b], or [b, k] with several objectives for each sample."""
    return output.square().sum(1) + output[:, 0] if k == 1 else output[:, :k].square()


def weights_of(k: int) -> Tensor:
    weights = torch.linspace(1, 2, SAMPLES * k, dtype=torch.float64)
    return weights if k == 1 else weights.view(SAMPLES, k)


def _on_ranks(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, scheme, k in CASES:
        for kind in KINDS:
            model = make(name)
            sizes = split_sizes(SAMPLES, world_size, kind)
            x = inputs(name, SAMPLES).split(sizes)[rank]
            ddp = wrap(model)
            engine = Engine(ddp, batch_dim=0, prefer="time" if kind == "uneven" else "bytes")
            with only(SCHEMES[scheme]), spying(rank, world_size) as log:
                global_gramian = engine.compute_gramian(losses_of(ddp(x), k))
                sent = sum(number for _, number in log[2:])
                weights = weights_of(k)
                engine.backward(losses_of(ddp(x), k), lambda _, weights=weights: weights)
            taken = engine._taken
            assert taken is not None and taken.plan is not None
            found[f"{name}/{scheme}/{k}/{kind}"] = {
                "gramian": global_gramian,
                "gradient": flat_grad(model.parameters()),
                "sent": sent,
                "planned": float(taken.plan.bytes_sent[rank]),
                "schemes": sorted({step.scheme.value for step in taken.plan.steps}),
            }
    return found


def _reference(name: str, k: int) -> tuple[Tensor, Tensor]:
    model = make(name)
    losses = losses_of(model(inputs(name, SAMPLES)), k)
    parameters = list(model.parameters())
    return gramian(losses, parameters), weighted_gradient(losses, weights_of(k), parameters)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_scheme_gives_the_gramian_of_one_process(world_size: int) -> None:
    ranks = run_ranks(_on_ranks, world_size, timeout=240)
    references = {(name, k): _reference(name, k) for name in MODELS for k in OBJECTIVES}
    for name, scheme, k in CASES:
        expected, gradient = references[name, k]
        for kind in KINDS:
            key = f"{name}/{scheme}/{k}/{kind}"
            for found in (rank[key] for rank in ranks):
                assert relative_error(found["gramian"], expected) <= BOUND, key
                assert relative_error(found["gradient"], gradient) <= BOUND, key
                assert torch.equal(found["gramian"], ranks[0][key]["gramian"]), key
                # What was sent is what was planned, to the byte, on every rank.
                assert found["sent"] == found["planned"], key
                if scheme != "planned":
                    assert scheme in found["schemes"], key


def _disagree(rank: int, world_size: int) -> str:
    ddp = wrap(make("mlp"))
    engine = Engine(ddp, batch_dim=0, prefer="time" if rank else "bytes")
    with pytest.raises(LayoutMismatchError) as caught:
        engine.compute_gramian(losses_of(ddp(inputs("mlp", 2)), 1))
    return str(caught.value)


def test_ranks_that_prefer_different_plans_are_told() -> None:
    for message in run_ranks(_disagree, 2):
        assert "prefer (rank 0: bytes, rank 1: time)" in message
