"""Rows of the Jacobian by one backward pass each, reduced and cut by the wrapper as it goes along.

``torch.autograd.grad`` towards sharded parameters does not exist: the graph knows the whole ones,
of which the wrapper takes the gradients away, module by module, to reduce-scatter them. So a row is
what a backward leaves in ``.grad``, which is put back as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from jddist.errors import UnsupportedModelError

from .collectives import Group
from .cut import adjacent_rows, like, new_rows, part_of, rows_like


@dataclass(frozen=True, eq=False)
class RowPass:
    """What one row starts from.

    Attributes:
        outputs: Tensors with a graph.
        cotangents: For each of them a tensor of its shape.
        scale: By what this rank's gradients are multiplied before the wrapper sums and divides
            them; 0 drops them, whatever they are.
        parameters: Towards what this row is differentiated.
    """

    outputs: Sequence[Tensor]
    cotangents: Sequence[Tensor]
    scale: float
    parameters: Sequence[Parameter]


def reduced_rows(
    passes: Sequence[RowPass],
    leaves: Mapping[Parameter, Tensor],
    group: Group,
    divisor: float,
    *,
    retain_graph: bool,
    summed: Collection[Parameter] = (),
    not_last: Callable[[], AbstractContextManager[None]] = nullcontext,
    order: Iterable[Parameter] = (),
) -> tuple[dict[Parameter, Tensor], list[bool]]:
    """Every parameter's rows of all passes, and whether this rank's part of each row is finite.

    Args:
        passes: One for each row, the same number with the same parameters on every rank.
        leaves: The tensor that stands for a sharded parameter in the graph.
        group: The ranks.
        divisor: By what the wrapper divides the sum over ranks.
        retain_graph: Whether to keep the graph after the last pass.
        summed: Parameters whose rows are added up: they get a gradient instead.
        not_last: A guard around every pass but the last.
        order: All parameters, in the order in which rows are to lie side by side.

    Returns:
        For each parameter of any pass [m, *shape], zeros in rows that are not differentiated
        towards it (or the sum [*shape]): a DTensor for a sharded one; and one flag for each row.
    """
    wanted = dict.fromkeys(p for one in passes for p in one.parameters)
    parameters = list(dict.fromkeys([*(p for p in order if p in wanted), *wanted]))
    _check_hooks(parameters)
    rows = {p: new_rows(p, 1) for p in parameters if p in summed}
    apart = [p for p in parameters if p not in rows]
    rows |= dict(zip(apart, adjacent_rows(apart, len(passes)), strict=True))
    flags = []
    for i, one in enumerate(passes):
        last = i == len(passes) - 1
        targets = {p: rows[p][0 if p in summed else i] for p in one.parameters}
        with nullcontext() if last else not_last():
            flags.append(_run(one, leaves, targets, retain_graph or not last))
    for parameter in parameters:
        if parameter not in leaves:  # all ranks hold it, and the wrapper leaves it alone
            reduced = group.all_reduce(rows[parameter].contiguous()).div_(divisor)
            rows[parameter].copy_(reduced)
    results = {
        p: like(p, local[0]) if p in summed else rows_like(p, local) for p, local in rows.items()
    }
    return results, flags


def _run(
    one: RowPass,
    leaves: Mapping[Parameter, Tensor],
    targets: Mapping[Parameter, Tensor],
    retain_graph: bool,
) -> bool:
    """Adds the row to ``targets``, which hold this rank's part of it."""
    reached = [leaves.get(p, p) for p in one.parameters]
    if not reached:
        return True
    with _own_gradients(one.parameters), _watched(reached, one.scale) as flags:
        torch.autograd.backward(
            list(one.outputs), list(one.cotangents), retain_graph=retain_graph, inputs=reached
        )
        for parameter in one.parameters:
            if parameter.grad is not None:
                targets[parameter].add_(part_of(parameter.grad))
    return all(bool(flag) for flag in flags)


@contextmanager
def _own_gradients(parameters: Sequence[Parameter]) -> Iterator[None]:
    """Inside, no ``.grad`` is there yet; afterwards they are what they were."""
    before = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad


@contextmanager
def _watched(leaves: Sequence[Tensor], scale: float) -> Iterator[list[Tensor]]:
    """Scales this rank's gradients before they are reduced, and notes whether they are finite."""
    flags: list[Tensor] = []

    def hook(gradient: Tensor) -> Tensor | None:
        flags.append(torch.isfinite(part_of(gradient)).all())
        if scale == 0.0:
            return torch.zeros_like(gradient)
        return None if scale == 1.0 else gradient * scale

    handles = [leaf.register_hook(hook) for leaf in leaves]
    try:
        yield flags
    finally:
        for handle in handles:
            handle.remove()


def _check_hooks(parameters: Sequence[Parameter]) -> None:
    """Raises UnsupportedModelError if something waits for a parameter's gradient."""
    if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters):
        raise UnsupportedModelError(
            "Found a hook that waits for the gradient of a sharded parameter (an optimizer in the "
            "backward, say); expected none, since it would take every row of the Jacobian for a "
            "gradient. Remove the hook and step after jac_to_grad."
        )
