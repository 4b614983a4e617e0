"""``mtl_backward`` where parameters are sharded: one backward pass of all ranks for each task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.nn.parameter import Parameter

from jddist.distribution.counts import Count, checked_count, shares_of_samples
from jddist.distribution.lockstep import as_plain, check_plain
from jddist.distribution.sharded import ShardedColumns

from ._accumulate import add_grads, add_jacs, check_expects_gradients
from ._arguments import as_tensors
from ._context import default_inputs, task_placement
from ._differentiate import check_chunk_size
from ._on_shards import check_parameters, described, task_rows
from ._tasks import check_disjoint, check_tasks_finite, starting_gradients


def mtl_on_shards(
    tensors: Sequence[Tensor],
    features: Sequence[Tensor] | Tensor,
    grad_tensors: Sequence[Tensor] | None,
    tasks_params: Sequence[Iterable[Tensor]] | None,
    shared_params: Iterable[Tensor] | None,
    retain_graph: bool,
    chunk_size: int | None,
    count: Count | None,
    distribution: ShardedColumns,
) -> None:
    """See ``mtl_backward``."""
    placement = task_placement(distribution)
    error: Exception | None = None
    agree: dict[str, object] = {}
    info: dict[str, object] = {}
    losses: list[Tensor] = []
    starts: list[Tensor] = []
    shared: list[Parameter] = []
    tasks: list[list[Parameter]] = []
    try:
        losses = [check_plain(as_plain(t)) for t in as_tensors(tensors, "tensors")]
        shared_from = as_tensors(features, "features")
        counts = checked_count(count, len(losses), placement)
        check_chunk_size(chunk_size)
        distribution.check_takes_passes()
        if shared_params is None:
            shared_params = default_inputs(shared_from, distribution)
        shared = check_parameters(shared_params, distribution)
        # A pass follows every path, so none may lead to shared parameters beside the features.
        beside = [default_inputs([t], distribution, excluded=shared_from) for t in losses]
        check_disjoint(shared, beside)
        given = beside if tasks_params is None else list(tasks_params)
        tasks = [check_parameters(params, distribution) for params in given]
        if len(tasks) != len(losses):
            raise ValueError(
                f"Found {len(tasks)} `tasks_params` for {len(losses)} `tensors`; expected as many."
            )
        check_disjoint(shared, tasks)
        starts = starting_gradients(losses, grad_tensors)
        check_expects_gradients([p for params in tasks for p in params], ".grad")
        check_expects_gradients(shared, ".jac")
        agree = {
            "number of tasks": len(losses),
            "dtypes of the tasks": [str(loss.dtype) for loss in losses],
            "whether count is given": counts is not None,
            "reshard": distribution.reshard,
            "shared parameters": described(shared, distribution),
            "parameters of the tasks": [described(params, distribution) for params in tasks],
        }
        info = {"count": counts}
    except Exception as failure:  # raised again on every rank, by the handshake
        error = failure
    infos = distribution.by_objectives(distribution.handshake("mtl_backward", agree, info, error))
    distribution.check_same_objectives(losses)
    shares = shares_of_samples([i["count"] for i in infos], len(losses))
    mine = shares[distribution.group.rank]
    factor = distribution.backward_factor(placement)
    jacs, gradients, finite = task_rows(
        losses,
        starts,
        shared,
        tasks,
        [share * factor for share in mine],
        distribution,
        retain_graph=retain_graph,
    )
    finite = [ok and bool(loss.isfinite().all()) for ok, loss in zip(finite, losses, strict=True)]
    infos = distribution.handshake("the rows of mtl_backward", {}, {"finite": finite})
    same = distribution.lockstep.group.size
    of_everyone = [shares[rank // same] for rank in range(len(infos))]
    check_tasks_finite([i["finite"] for i in infos], of_everyone)
    add_grads(list(gradients), list(gradients.values()), distribution)
    add_jacs(list(jacs), list(jacs.values()))
