"""The brute-force reference for frameworks: one process, and their conventions of accumulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jddist.aggregation import UPGradWeighting
from tests._oracle import jacobian, relative_error
from tests.distributed._training import (
    LOSSES,
    OPTIMIZERS,
    STEPS,
    make_data,
    make_network,
    parameters_of,
    set_gradients,
)

BOUND = 1e-10
CLIP = 0.5
# The samples of the micro-batches of one step.
MICRO = {1: [slice(0, 9)], 2: [slice(0, 5), slice(5, 9)]}


def reference(
    objective: str,
    optimizer: str = "sgd",
    *,
    micro: int = 1,
    mean: bool = True,
    clip: bool = False,
    bf16: bool = False,
) -> list[Tensor]:
    """Parameters after each step of one process.

    Args:
        objective: One of LOSSES.
        optimizer: One of OPTIMIZERS.
        micro: The number of micro-batches of a step, each with weights of its own.
        mean: Whether their gradients are averaged; else they are added up.
        clip: Whether the gradient's norm is clipped to CLIP.
        bf16: Whether the model is in float32, and its forward under autocast.
    """
    model, (x, y) = make_network(), make_data()
    if bf16:
        model, x, y = model.float(), x.float(), y.float()
    parameters = list(model.parameters())
    opt = OPTIMIZERS[optimizer](parameters)
    result = []
    for _ in range(STEPS):
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=x.dtype)
        for part in MICRO[micro]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                losses = LOSSES[objective](model(x[part]).to(x.dtype), y[part])
            rows = jacobian(losses, parameters).double()
            weights = UPGradWeighting()(rows @ rows.T)
            total += (weights @ rows).to(x.dtype) / (micro if mean else 1)
        set_gradients(model, total)
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        opt.step()
        result.append(parameters_of(model))
    return result


def check(found: list[list[Tensor]], expected: list[Tensor], bound: float = BOUND) -> None:
    """Compares the parameters after each step of every rank; the ranks' have to be the same."""
    for rank, parameters in enumerate(found):
        assert len(parameters) == len(expected)
        for step, (got, wanted) in enumerate(zip(parameters, expected, strict=True)):
            error = relative_error(got, wanted)
            assert error <= bound, (rank, step, error)
            assert torch.equal(got, found[0][step]), (rank, step)


def moved(expected: list[Tensor]) -> float:
    """How far the parameters moved, so that a tolerance is seen to mean something."""
    return relative_error(expected[-1], expected[0])


def failure_of(call: Any, kind: type[Exception]) -> str:
    """The message of the exception that ``call()`` is expected to raise."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"expected {kind.__name__}, found no exception")
