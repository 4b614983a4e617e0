"""Parameters beside a wrapper: all ranks hold them alike; no backward reduces their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn.parameter import Parameter

from .base import accumulate
from .collectives import Group


@contextmanager
def reduced_together(
    parameters: Sequence[Parameter], group: Group, divisor: float
) -> Iterator[None]:
    """What a backward inside adds to ``.grad`` is summed over the ranks and divided by ``divisor``.

    Args:
        parameters: The parameters, in an order that is the same on every rank.
        group: The ranks; all of them have to enter.
        divisor: By what the sum is divided.
    """
    if not parameters or group.size == 1:
        yield
        return
    before = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
        found = [p.grad for p in parameters]
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
    dtype, device = torch.float32, parameters[0].device
    for parameter in parameters:
        dtype = torch.promote_types(dtype, parameter.dtype)
    # A rank whose graph does not lead to a parameter takes part all the same.
    pieces = [
        torch.zeros(p.numel(), dtype=dtype, device=device) if g is None else g.reshape(-1).to(dtype)
        for p, g in zip(parameters, found, strict=True)
    ]
    present = torch.tensor([float(g is not None) for g in found], dtype=dtype, device=device)
    total = group.all_reduce(torch.cat([*pieces, present]))
    *sums, there = total.split([*(p.numel() for p in parameters), len(parameters)])
    for parameter, part, flag in zip(parameters, sums, there.tolist(), strict=True):
        if flag:
            mean = (part / divisor).to(parameter.dtype).view(parameter.shape)
            accumulate(parameter, mean.clone())
