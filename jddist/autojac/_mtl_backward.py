"""``mtl_backward``: gradients of task parameters, Jacobians of shared ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import Placement

from jddist._autocast import without_autocast
from jddist.distribution.base import Distribution, is_average
from jddist.distribution.counts import Count, checked_count, shares_of_samples
from jddist.distribution.exchange import scale_rows
from jddist.distribution.sharded import ShardedColumns
from jddist.distribution.whole import numel_of, shape_of

from ._accumulate import add_grads, add_jacs, check_expects_gradients
from ._arguments import as_tensors
from ._context import default_inputs, involved_distribution, task_placement
from ._differentiate import check_chunk_size, vjp_rows
from ._mtl_on_shards import mtl_on_shards
from ._tasks import check_disjoint, check_tasks_finite, starting_gradients


@dataclass(eq=False)
class TaskGradients:
    """What one rank finds before anything is written.

    Attributes:
        shared: The shared parameters.
        rows: For each of them [m, *shape].
        tasks: For each task its parameters with their gradients.
        finite: For each task, whether its loss and all its gradients are finite.
    """

    shared: list[Tensor]
    rows: list[Tensor]
    tasks: list[list[tuple[Tensor, Tensor]]]
    finite: list[bool]


@without_autocast()
def mtl_backward(
    tensors: Sequence[Tensor],
    /,
    features: Sequence[Tensor] | Tensor,
    *,
    grad_tensors: Sequence[Tensor] | None = None,
    tasks_params: Sequence[Iterable[Tensor]] | None = None,
    shared_params: Iterable[Tensor] | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
    count: Count | None = None,
    distribution: Distribution | None = None,
) -> None:
    """Differentiates m tasks that share features.

    Each task's own parameters get the gradient of that task in ``.grad``; the shared parameters
    get the Jacobian [m, *shape] of all tasks in ``.jac``, for ``jac_to_grad`` to aggregate.

    Over several ranks the tasks' losses are estimates of the same m global losses: means over
    ranks, or with ``count`` means over all samples (sums if the model was attached with
    ``Partial("sum")``). The task parameters' gradients are reduced at once, the shared rows by
    ``jac_to_grad``. If parameters are in ``fully_shard``, the shared rows are reduced at once too:
    every task is a backward pass of all ranks together, and ``.jac`` a DTensor.

    Args:
        tensors: The tasks' losses: scalars, unless ``grad_tensors`` are given.
        features: The last shared representations.
        grad_tensors: For each of ``tensors`` a tensor of its shape to start from.
        tasks_params: For each task its parameters; by default the leaves that its loss depends on
            other than through the features. One may belong to several tasks: their gradients add.
        shared_params: By default the leaves that the features depend on.
        retain_graph: Whether to keep the graph.
        parallel_chunk_size: How many rows to differentiate in parallel: None for all, 1 for one
            after the other, without vmap. (A tensor inside the graph that retains its gradient
            gets an unusable ``.grad`` from vmap.)
        count: On several ranks, the number of samples behind this rank's losses: an int, or one
            number per task where labels are missing. A task with 0 adds nothing, and its loss may
            be NaN.
        distribution: ``Local()`` if every rank is meant to work alone.

    Raises:
        ValueError: An argument is not as described.
        NonFiniteObjectiveError: A loss or its gradient is NaN or infinite, on any rank.
        UnattachedParameterError: Several ranks run and a parameter belongs to no attached model.
        LayoutMismatchError: The ranks disagree on the number of tasks.
        RankError: Another rank failed.
    """
    group = involved_distribution(tensors, distribution)
    if isinstance(group, ShardedColumns):
        mtl_on_shards(
            tensors,
            features,
            grad_tensors,
            tasks_params,
            shared_params,
            retain_graph,
            parallel_chunk_size,
            count,
            group,
        )
        return
    placement = task_placement(group)
    error: Exception | None = None
    found: TaskGradients | None = None
    agree: dict[str, object] = {}
    info: dict[str, object] = {}
    with group.first_pass():  # every rank has to enter, whatever it runs into inside
        try:
            group.check_gives_rows()
            losses = as_tensors(tensors, "tensors")
            counts = checked_count(count, len(losses), placement)
            found = _differentiate(
                losses,
                [group.inside(f) for f in as_tensors(features, "features")],
                grad_tensors,
                None if tasks_params is None else [_unique(p) for p in tasks_params],
                None if shared_params is None else _unique(shared_params),
                group,
                retain_graph,
                parallel_chunk_size,
            )
            agree = {
                "number of tasks": len(losses),
                "dtypes of the tasks": [str(loss.dtype) for loss in losses],
                "whether count is given": counts is not None,
            }
            info = {"count": counts, "finite": found.finite, "tasks": _own_parameters(found, group)}
        except Exception as failure:  # raised again on every rank, by the handshake
            error = failure
    infos = group.handshake("mtl_backward", agree, info, error)
    assert found is not None
    m = len(found.finite)
    shares = shares_of_samples([i["count"] for i in infos], m)
    check_tasks_finite([i["finite"] for i in infos], shares)
    share = torch.tensor(shares[group.group.rank], dtype=torch.float64)
    gradients = _sum_over_tasks(found, shares[group.group.rank])
    if group.group.size > 1:
        needed = sorted({i for of_rank in infos for i in of_rank["tasks"]})
        gradients = _reduce(gradients, needed, group, placement)
    add_grads(list(gradients), list(gradients.values()), group)
    rows = found.rows
    if any(s != 1.0 for s in share.tolist()):
        rows = [scale_rows(r, share.to(r.device)) for r in rows]
    add_jacs(found.shared, rows)
    for parameter in found.shared:
        group.row_placements[parameter] = placement


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list(dict.fromkeys(tensors))


def _differentiate(
    losses: list[Tensor],
    features: list[Tensor],
    grad_tensors: Sequence[Tensor] | None,
    tasks_params: list[list[Tensor]] | None,
    shared_params: list[Tensor] | None,
    distribution: Distribution,
    retain_graph: bool,
    chunk_size: int | None,
) -> TaskGradients:
    check_chunk_size(chunk_size)
    shared = default_inputs(features, distribution) if shared_params is None else shared_params
    if tasks_params is None:
        tasks_params = [default_inputs([t], distribution, excluded=features) for t in losses]
    if len(tasks_params) != len(losses):
        raise ValueError(
            f"Found {len(tasks_params)} `tasks_params` for {len(losses)} `tensors`; expected as "
            "many."
        )
    check_disjoint(shared, tasks_params)
    starts = starting_gradients(losses, grad_tensors)
    check_expects_gradients([p for params in tasks_params for p in params], ".grad")
    check_expects_gradients(shared, ".jac")
    tasks, at_features, finite = [], [], []
    for i, (loss, params, start) in enumerate(zip(losses, tasks_params, starts, strict=True)):
        # Heads may share nodes of the graph: free them with the last task.
        keep = retain_graph or i < len(losses) - 1
        rows = vjp_rows(
            [loss], [*params, *features], [start.unsqueeze(0)], retain_graph=keep, chunk_size=1
        )
        grads = [row.squeeze(0) for row in rows]
        tasks.append(list(zip(params, grads[: len(params)], strict=True)))
        at_features.append(grads[len(params) :])
        finite.append(torch.isfinite(loss).all() & _all_finite(grads, loss))
    cotangents = [torch.stack(column) for column in zip(*at_features, strict=True)]
    jacs = vjp_rows(features, shared, cotangents, retain_graph=retain_graph, chunk_size=chunk_size)
    flags = torch.stack(finite)
    for jac in jacs:
        flags &= torch.isfinite(jac.reshape(len(jac), -1)).all(dim=1).to(flags.device)
    return TaskGradients(shared, jacs, tasks, flags.tolist())


def _all_finite(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    finite = torch.ones((), dtype=torch.bool, device=like.device)
    for tensor in tensors:
        finite &= torch.isfinite(tensor).all().to(like.device)
    return finite


def _own_parameters(found: TaskGradients, distribution: Distribution) -> list[int]:
    """The indices, among the attached parameters, of those that tasks have for themselves."""
    if distribution.group.size == 1:
        return []
    position = {id(p): i for i, p in enumerate(distribution.names)}
    return sorted({position[id(p)] for task in found.tasks for p, _ in task})


def _sum_over_tasks(found: TaskGradients, shares: Sequence[float]) -> dict[Tensor, Tensor]:
    total: dict[Tensor, Tensor] = {}
    for task, share in zip(found.tasks, shares, strict=True):
        for parameter, gradient in task:
            if share == 0.0:
                gradient = torch.zeros_like(gradient)  # it may be NaN
            elif share != 1.0:
                gradient = gradient * share
            total[parameter] = total[parameter] + gradient if parameter in total else gradient
    return total


def _reduce(
    gradients: dict[Tensor, Tensor],
    needed: Sequence[int],
    distribution: Distribution,
    placement: Placement,
) -> dict[Tensor, Tensor]:
    """The gradients over all ranks of every parameter that some rank's tasks have, in one go."""
    if not needed:
        return {}
    attached = list(distribution.names)
    parameters = [attached[i] for i in needed]
    dtype = parameters[0].dtype
    for parameter in parameters:
        dtype = torch.promote_types(dtype, parameter.dtype)
    pieces = [
        gradients[p].reshape(-1).to(dtype)
        if p in gradients
        else p.new_zeros(numel_of(p), dtype=dtype)
        for p in parameters
    ]
    flat = distribution.group.all_reduce(torch.cat(pieces))
    if is_average(placement):
        flat /= distribution.group.size
    parts = flat.split([numel_of(p) for p in parameters])
    return {
        p: part.reshape(shape_of(p)).to(p.dtype) for p, part in zip(parameters, parts, strict=True)
    }
