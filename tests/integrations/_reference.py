"""The brute-force reference for frameworks: one process, and their conventions of accumulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jddist.aggregation import IMTLG, UPGrad, UPGradWeighting
from jddist.autojac import jac_to_grad_groups, mtl_backward
from tests._oracle import jacobian, relative_error
from tests.distributed._training import (
    LOSSES,
    OPTIMIZERS,
    STEPS,
    TASKS,
    Network,
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


def groups_of(network: Network) -> list[list[nn.Parameter]]:
    """The shared parameters in two groups; those of ``last`` belong to the tasks."""
    first = [*network.first.parameters(), *network.norm.parameters()]
    return [first, list(network.twice.parameters())]


def task_step(network: Network, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The gradient of four tasks, aggregated by groups; ``model`` is the network as wrapped."""
    kept: list[Tensor] = []
    handle = network.last.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    out = model(x)
    handle.remove()
    tasks = (out - y).pow(2)
    losses = [tasks[:, i].sum() / max(len(x), 1) for i in range(TASKS)]
    last = list(network.last.parameters())
    shared = [p for group in groups_of(network) for p in group]
    mtl_backward(losses, kept, tasks_params=[last] * TASKS, shared_params=shared, count=len(x))
    jac_to_grad_groups(groups_of(network), [UPGrad(), IMTLG()])


def task_reference() -> list[Tensor]:
    """``task_step`` in one process, by brute force."""
    network, (x, y) = make_network(), make_data()
    opt = OPTIMIZERS["sgd"](list(network.parameters()))
    groups, last = groups_of(network), list(network.last.parameters())
    result = []
    for _ in range(STEPS):
        opt.zero_grad()
        losses = LOSSES["task"](network(x), y)
        for parameter, gradient in zip(
            last, torch.autograd.grad(losses.sum(), last, retain_graph=True), strict=True
        ):
            parameter.grad = gradient
        for group, aggregator in zip(groups, [UPGrad(), IMTLG()], strict=True):
            pieces = aggregator(jacobian(losses, group)).split([p.numel() for p in group])
            for parameter, piece in zip(group, pieces, strict=True):
                parameter.grad = piece.view_as(parameter)
        opt.step()
        result.append(parameters_of(network))
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
