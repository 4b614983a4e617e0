"""``backward``, ``jac`` and ``mtl_backward`` towards sharded parameters.

There a row is reduced or communicated in other ways while it is differentiated, and each rank is
left with its columns. So each row is one pass in which all ranks take part, and they have to agree
before the first one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Placement
from torch.nn.parameter import Parameter

from jddist.distribution.base import is_sharded
from jddist.distribution.counts import shares_of_samples
from jddist.distribution.row_passes import RowPass
from jddist.distribution.sharded import ShardedColumns

from ._counted import number_of_rows


def check_parameters(tensors: Iterable[Tensor], distribution: ShardedColumns) -> list[Parameter]:
    """The parameters themselves, whatever form the wrapper left them in.

    Raises:
        ValueError: One is no parameter of the model.
    """
    stand_ins = distribution.stand_ins()
    parameters: list[Any] = [stand_ins.get(tensor, tensor) for tensor in tensors]
    for parameter in parameters:
        if parameter not in distribution.names:
            raise ValueError(
                f"Found a tensor of shape {tuple(parameter.shape)} to differentiate towards that "
                "is no parameter of the attached model; expected parameters alone, since every row "
                "is a pass of all ranks, towards what all of them know."
            )
    return list(dict.fromkeys(parameters))


def described(parameters: Iterable[Parameter], distribution: ShardedColumns) -> str:
    """Parameters in a form that ranks can compare."""
    names = sorted(distribution.names[p] for p in parameters)
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()
    return f"{len(names)} with digest {digest}"


def rows_of_elements(
    call: str,
    outputs: Sequence[Tensor],
    parameters: Sequence[Parameter],
    cotangents: Sequence[Tensor] | None,
    placement: Placement,
    distribution: ShardedColumns,
    *,
    counts: list[float] | None,
    retain_graph: bool,
    error: Exception | None,
) -> dict[Parameter, Tensor]:
    """The rows of all elements of the outputs, or of all cotangents, over all ranks.

    Under ``Shard(0)`` there is a pass for each row of each rank, to which the others add zeros.

    Args:
        call: The public function under way.
        outputs: Tensors with a graph.
        parameters: Towards what, the same on every rank.
        cotangents: For each output [m, *output.shape]; None for the identity.
        placement: Where the rows live before they are reduced.
        distribution: The ranks.
        counts: The number of samples behind each of this rank's estimates of rows, if it is given.
        retain_graph: Whether to keep the graph.
        error: What this rank already ran into, for the others to hear.
    """
    agree: dict[str, object] = {}
    info: dict[str, Any] = {}
    try:
        if error is not None:
            raise error
        distribution.check_takes_passes()
        m = number_of_rows(outputs, cotangents)
        agree = {
            "parameters": described(parameters, distribution),
            "reshard": distribution.reshard,
            "whether count is given": counts is not None,
        }
        if not is_sharded(placement):
            agree["number of rows"] = m
        info = {"rows": m, "count": counts}
    except Exception as failure:  # raised again on every rank, by the handshake
        error = failure
    infos = distribution.by_objectives(distribution.handshake(call, agree, info, error))
    distribution.check_same_objectives(outputs)
    factor = distribution.backward_factor(placement)
    nothing = [torch.zeros_like(o) for o in outputs]
    starts = _starts(outputs, cotangents)
    shares = [1.0] * len(starts)
    if not is_sharded(placement):
        of_ranks = shares_of_samples([i["count"] for i in infos], len(starts))
        shares = of_ranks[distribution.group.rank]
    mine = [
        RowPass(outputs, start, share * factor, parameters)
        for start, share in zip(starts, shares, strict=True)
    ]
    passes = mine
    if is_sharded(placement):
        passes = []
        for rank, of_rank in enumerate(infos):
            if rank == distribution.group.rank:
                passes += mine
            else:
                passes += [RowPass(outputs, nothing, 0.0, parameters)] * of_rank["rows"]
    rows, _ = distribution.rows(passes, retain_graph=retain_graph)
    return {p: rows[p] if p in rows else distribution.no_rows(p) for p in parameters}


def task_rows(
    losses: Sequence[Tensor],
    starts: Sequence[Tensor],
    shared: Sequence[Parameter],
    tasks: Sequence[Sequence[Parameter]],
    scales: Sequence[float],
    distribution: ShardedColumns,
    *,
    retain_graph: bool,
) -> tuple[dict[Parameter, Tensor], dict[Parameter, Tensor], list[bool]]:
    """Rows of the shared parameters, gradients of the tasks' own, and a flag for each task.

    Args:
        losses: The tasks' losses.
        starts: The gradients to start from.
        shared: The shared parameters.
        tasks: For each task its own parameters.
        scales: For each task, by what this rank's gradients are multiplied.
        distribution: The ranks.
        retain_graph: Whether to keep the graph.
    """
    passes = [
        RowPass([loss], [start], scale, [*shared, *own])
        for loss, start, own, scale in zip(losses, starts, tasks, scales, strict=True)
    ]
    own_parameters = {p for own in tasks for p in own}
    rows, flags = distribution.rows(passes, retain_graph=retain_graph, summed=own_parameters)
    jacs = {p: rows[p] for p in shared}
    return jacs, {p: r for p, r in rows.items() if p not in jacs}, flags


def _starts(outputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None) -> list[list[Tensor]]:
    if cotangents is not None:
        return [[c[i] for c in cotangents] for i in range(len(cotangents[0]))]
    starts = []
    for position, output in enumerate(outputs):
        for element in range(output.numel()):
            start = [torch.zeros_like(o) for o in outputs]
            start[position].view(-1)[element] = 1.0
            starts.append(start)
    return starts
