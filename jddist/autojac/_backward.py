"""``backward``: Jacobians of tensors into the ``.jac`` of what they depend on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.nn.parameter import Parameter

from jddist._autocast import without_autocast
from jddist.aggregation import Aggregator
from jddist.distribution.base import Distribution
from jddist.distribution.counts import Count
from jddist.distribution.lockstep import as_plain, check_plain
from jddist.distribution.sharded import ShardedColumns

from ._accumulate import add_jacs, check_expects_gradients, free_jacs, jac_of
from ._arguments import as_cotangents, as_tensors
from ._context import default_inputs, involved_distribution, stated_objectives
from ._counted import counted_rows, counts_of, number_of_rows
from ._differentiate import check_chunk_size, vjp_rows
from ._jac_to_grad import aggregate_groups
from ._on_shards import check_parameters, rows_of_elements


@without_autocast()
def backward(
    tensors: Sequence[Tensor] | Tensor,
    aggregator: Aggregator | None = None,
    /,
    *,
    jac_tensors: Sequence[Tensor] | Tensor | None = None,
    inputs: Iterable[Tensor] | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
    count: Count | None = None,
    distribution: Distribution | None = None,
) -> None:
    """Adds the Jacobian of all elements of ``tensors`` to the ``.jac`` of the inputs.

    Over several ranks ``.jac`` holds this rank's rows (or its estimate of the rows), without any
    communication but that of ``count``; ``jac_to_grad`` communicates. Of parameters in
    ``fully_shard`` it holds this rank's columns of all rows: every row is a backward pass of its
    own, of all ranks together.

    Args:
        tensors: What to differentiate; every element is one row.
        aggregator: If given, the Jacobians are aggregated into ``.grad`` at once, as
            ``jac_to_grad`` does.
        jac_tensors: For each tensor the initial Jacobian [m, *tensor.shape] to go on from; the
            identity by default.
        inputs: Towards what to differentiate; by default the leaves that ``tensors`` depend on.
        retain_graph: Whether to keep the graph.
        parallel_chunk_size: How many rows to differentiate in parallel: None for all, 1 for one
            after the other, without vmap. (A tensor inside the graph that retains its gradient
            gets an unusable ``.grad`` from vmap.)
        count: On several ranks with ``objectives=Partial("avg")``, the number of samples behind
            this rank's estimates: an int, or one for each row. The global objectives are then the
            means over all samples, for which the ranks exchange their counts; without it they are
            the means over ranks.
        distribution: ``Local()`` if every rank is meant to work alone.

    Raises:
        ValueError: An argument is not as described; or several ranks run and ``attach`` was not
            told where the objectives live.
        UnattachedParameterError: Several ranks run and an input belongs to no attached model.
    """
    given = [tensors] if isinstance(tensors, Tensor) else tensors
    distribution = involved_distribution(given, distribution)
    placement = stated_objectives(distribution)
    if isinstance(distribution, ShardedColumns):
        _backward_on_shards(
            tensors, aggregator, jac_tensors, inputs, retain_graph, parallel_chunk_size, count,
            distribution,
        )  # fmt: skip
        return
    error: Exception | None = None
    found: list[Tensor] = []
    rows: list[Tensor] = []
    counts: list[float] | None = None
    before: list[Tensor | None] = []
    with distribution.first_pass():  # every rank has to enter, whatever it runs into inside
        try:
            distribution.check_gives_rows()
            outputs = as_tensors(tensors, "tensors")
            if inputs is None:
                found = default_inputs(outputs, distribution)
            else:
                found = list(dict.fromkeys(inputs))
            check_chunk_size(parallel_chunk_size)
            check_expects_gradients(found, ".jac")
            cotangents = as_cotangents(outputs, jac_tensors, "jac_tensors", "tensors")
            counts = counts_of(count, number_of_rows(outputs, cotangents), distribution)
            rows = vjp_rows(
                outputs,
                found,
                cotangents,
                retain_graph=retain_graph,
                chunk_size=parallel_chunk_size,
            )
        except Exception as failure:
            # With one of these the other ranks wait for this one, and have to hear of it.
            waited_for = aggregator is not None or count is not None
            if not waited_for or distribution.group.size == 1:
                raise
            error = failure
    if count is not None:
        rows = counted_rows("backward", rows, counts, distribution, error)
    if error is None:
        try:
            if aggregator is not None:
                before = [None if (jac := jac_of(t)) is None else jac.clone() for t in found]
            add_jacs(found, rows)
            for tensor in found:
                distribution.row_placements[tensor] = placement
        except Exception as failure:
            if aggregator is None or distribution.group.size == 1:
                raise
            error = failure
    if aggregator is not None:
        try:
            aggregate_groups([found], [aggregator], distribution=distribution, error=error)
        except Exception:
            # Rows of a step that failed must not be added to those of the next.
            free_jacs(found)
            for tensor, jac in zip(found, before, strict=False):
                if jac is not None:
                    add_jacs([tensor], [jac])
            raise


def _backward_on_shards(
    tensors: Sequence[Tensor] | Tensor,
    aggregator: Aggregator | None,
    jac_tensors: Sequence[Tensor] | Tensor | None,
    inputs: Iterable[Tensor] | None,
    retain_graph: bool,
    chunk_size: int | None,
    count: Count | None,
    distribution: ShardedColumns,
) -> None:
    placement = stated_objectives(distribution)
    error: Exception | None = None
    outputs: list[Tensor] = []
    parameters: list[Parameter] = []
    cotangents: list[Tensor] | None = None
    counts: list[float] | None = None
    try:
        outputs = [check_plain(as_plain(t)) for t in as_tensors(tensors, "tensors")]
        check_chunk_size(chunk_size)
        given = default_inputs(outputs, distribution) if inputs is None else inputs
        parameters = check_parameters(given, distribution)
        check_expects_gradients(parameters, ".jac")
        cotangents = as_cotangents(outputs, jac_tensors, "jac_tensors", "tensors")
        counts = counts_of(count, number_of_rows(outputs, cotangents), distribution)
    except Exception as failure:  # raised again on every rank, by the handshake
        error = failure
    rows = rows_of_elements(
        "backward",
        outputs,
        parameters,
        cotangents,
        placement,
        distribution,
        counts=counts,
        retain_graph=retain_graph,
        error=error,
    )
    before = {p: jac_of(p) for p in rows} if aggregator is not None else {}
    before = {p: None if jac is None else jac.clone() for p, jac in before.items()}
    add_jacs(list(rows), list(rows.values()))
    if aggregator is None:
        return
    try:
        aggregate_groups([list(rows)], [aggregator], distribution=distribution)
    except Exception:
        # Rows of a step that failed must not be added to those of the next.
        free_jacs(rows)
        for parameter, jac in before.items():
            if jac is not None:
                add_jacs([parameter], [jac])
        raise
