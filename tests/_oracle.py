"""The slow and obvious reference: the Jacobian, one row at a time, by plain autograd.

Everything that jddist computes is compared with what follows from these rows. Nothing here may use
jddist, or be clever.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def jacobian(output: Tensor, params: Iterable[Tensor]) -> Tensor:
    """The Jacobian of ``output``, row by row.

    Args:
        output: Objectives of any shape, with their graph (which is kept).
        params: Parameters, of which those without ``requires_grad`` are left out.

    Returns:
        [output.numel(), n]: rows in the order of ``output.flatten()``, columns in the order of
        ``params``; zeros where an objective does not depend on a parameter.
    """
    inputs = [p for p in params if p.requires_grad]
    columns = sum(p.numel() for p in inputs)
    rows = [
        torch.cat([g.reshape(-1) for g in _gradients(element, inputs)])
        for element in output.reshape(-1)
    ]
    return torch.stack(rows) if rows else output.new_zeros(0, columns)


def gramian(output: Tensor, params: Iterable[Tensor]) -> Tensor:
    """The generalized Gramian of ``output``.

    Returns:
        [] for a scalar, [m, m] for a vector, [m1, m2, m2, m1] for a matrix and so on: entry
        [i, j, k, l] is the inner product of the rows of output[i, j] and output[l, k].
    """
    rows = jacobian(output, params)
    square = rows @ rows.T
    forward = list(output.shape)
    ndim = output.ndim
    second_half_reversed = [*range(ndim), *reversed(range(ndim, 2 * ndim))]
    return square.reshape(forward + forward).permute(second_half_reversed)


def weighted_gradient(output: Tensor, weights: Tensor, params: Iterable[Tensor]) -> Tensor:
    """The rows combined with ``weights`` (of the shape of ``output``): [n]."""
    return weights.reshape(-1) @ jacobian(output, params)


def flat_grad(params: Iterable[Tensor]) -> Tensor:
    """The ``.grad`` of all parameters that require one, zeros where it is None: [n]."""
    trained = [p for p in params if p.requires_grad]
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in trained]
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of ``expected`` (the plain norm if that is zero).

    Raises:
        ValueError: The shapes differ.
    """
    if found.shape != expected.shape:
        raise ValueError(
            f"Found shape {tuple(found.shape)}; expected {tuple(expected.shape)}, since a "
            "broadcast comparison would hide the mistake. Compare tensors of one shape."
        )
    scale = float(expected.double().norm())
    difference = float((found.double() - expected.double()).norm())
    return difference / scale if scale > 0 else difference


def rows_of_factors(model: nn.Module, inputs: Tensor, losses: Callable[[Tensor], Tensor]) -> Tensor:
    """The Jacobian of one loss per sample in float64, from factors in the model's own precision.

    Every layer's inputs and output gradients are taken as the network computes them, and only what
    follows is done in float64: so a difference from the engine's Gramian is the engine's rounding.

    Args:
        model: Layers that are called once, with one input each.
        inputs: [b, ...].
        losses: From the model's output to [b].

    Returns:
        [b, n], layer by layer.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    layers = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    handles = [
        layer.register_forward_hook(lambda m, args, out: calls.append((m, args[0].detach(), out)))
        for layer in layers
    ]
    objective = losses(model(inputs)).sum()
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(objective, [out for _, _, out in calls])
    pieces = []
    for (layer, a, _), g in zip(calls, grads, strict=True):
        twin = copy.deepcopy(layer).double()
        output = twin(a.double() if a.is_floating_point() else a)
        pieces.append(jacobian((output * g.double()).flatten(1).sum(1), twin.parameters()))
    return torch.cat(pieces, dim=1)


def _gradients(element: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    if not element.requires_grad:
        return [torch.zeros_like(p) for p in inputs]
    found = torch.autograd.grad(element, inputs, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g.detach() for p, g in zip(inputs, found, strict=True)
    ]
