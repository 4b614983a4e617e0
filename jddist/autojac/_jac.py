"""``jac``: Jacobians of tensors, returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import Parameter
from torch.overrides import is_tensor_like

from jddist._autocast import without_autocast
from jddist.distribution.base import Distribution
from jddist.distribution.counts import Count
from jddist.distribution.lockstep import as_plain, check_plain
from jddist.distribution.select import originals
from jddist.distribution.sharded import ShardedColumns

from ._arguments import as_cotangents, as_tensors, check_requires_grad
from ._context import involved_distribution, stated_objectives
from ._counted import counted_rows, counts_of, number_of_rows
from ._differentiate import check_chunk_size, vjp_rows
from ._on_shards import check_parameters, rows_of_elements


@without_autocast()
def jac(
    outputs: Sequence[Tensor] | Tensor,
    inputs: Sequence[Tensor] | Tensor,
    *,
    jac_outputs: Sequence[Tensor] | Tensor | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
    count: Count | None = None,
    distribution: Distribution | None = None,
) -> tuple[Tensor, ...]:
    """The Jacobians of all elements of ``outputs`` towards each of ``inputs``.

    Over several ranks they are this rank's rows; nothing but ``count`` is communicated. Of
    parameters in ``fully_shard`` they are this rank's columns of all rows, in a DTensor.

    Args:
        outputs: What to differentiate; every element is one row.
        inputs: Towards what; one tensor may stand there repeatedly.
        jac_outputs: For each output the initial Jacobian [m, *output.shape] to go on from; the
            identity by default.
        retain_graph: Whether to keep the graph.
        parallel_chunk_size: How many rows to differentiate in parallel: None for all, 1 for one
            after the other, without vmap. (A tensor inside the graph that retains its gradient
            gets an unusable ``.grad`` from vmap.)
        count: On several ranks with ``objectives=Partial("avg")``, the number of samples behind
            this rank's estimates: an int, or one for each row. The global objectives are then the
            means over all samples, for which the ranks exchange their counts; without it they are
            the means over ranks.
        distribution: ``Local()`` if every rank is meant to work alone.

    Returns:
        For each input a tensor [m, *input.shape].

    Raises:
        ValueError: An argument is not as described; or several ranks run and ``attach`` was not
            told where the objectives live.
        UnattachedParameterError: Several ranks run and an input belongs to no attached model.
    """
    given = [outputs] if isinstance(outputs, Tensor) else outputs
    found = involved_distribution(given, distribution)
    if isinstance(found, ShardedColumns):
        return _jac_on_shards(
            outputs, inputs, jac_outputs, retain_graph, parallel_chunk_size, count, found
        )
    error: Exception | None = None
    listed: list[Tensor] = []
    unique: list[Tensor] = []
    rows: list[Tensor] = []
    counts: list[float] | None = None
    with found.first_pass():  # every rank has to enter, whatever it runs into inside
        try:
            found.check_gives_rows()
            check_chunk_size(parallel_chunk_size)
            differentiated = as_tensors(outputs, "outputs")
            listed = [inputs] if is_tensor_like(inputs) else list(inputs)  # type: ignore[list-item]
            unique = list(dict.fromkeys(listed))
            check_requires_grad(unique, "inputs")
            stated_objectives(found)
            cotangents = as_cotangents(differentiated, jac_outputs, "jac_outputs", "outputs")
            counts = counts_of(count, number_of_rows(differentiated, cotangents), found)
            rows = vjp_rows(
                differentiated,
                unique,
                cotangents,
                retain_graph=retain_graph,
                chunk_size=parallel_chunk_size,
            )
        except Exception as failure:
            if count is None or found.group.size == 1:
                raise
            error = failure  # raised again on every rank, by the handshake
    if count is not None:
        rows = counted_rows("jac", rows, counts, found, error)
    by_input = dict(zip(unique, rows, strict=True))
    return tuple(by_input[tensor] for tensor in listed)


def _jac_on_shards(
    outputs: Sequence[Tensor] | Tensor,
    inputs: Sequence[Tensor] | Tensor,
    jac_outputs: Sequence[Tensor] | Tensor | None,
    retain_graph: bool,
    chunk_size: int | None,
    count: Count | None,
    distribution: ShardedColumns,
) -> tuple[Tensor, ...]:
    placement = stated_objectives(distribution)
    error: Exception | None = None
    differentiated: list[Tensor] = []
    parameters: list[Parameter] = []
    listed: list[Tensor] = []
    cotangents: list[Tensor] | None = None
    counts: list[float] | None = None
    try:
        check_chunk_size(chunk_size)
        differentiated = [check_plain(as_plain(t)) for t in as_tensors(outputs, "outputs")]
        listed = [inputs] if is_tensor_like(inputs) else list(inputs)  # type: ignore[list-item]
        parameters = check_parameters(listed, distribution)
        check_requires_grad(parameters, "inputs")
        cotangents = as_cotangents(differentiated, jac_outputs, "jac_outputs", "outputs")
        counts = counts_of(count, number_of_rows(differentiated, cotangents), distribution)
    except Exception as failure:  # raised again on every rank, by the handshake
        error = failure
    rows = rows_of_elements(
        "jac",
        differentiated,
        parameters,
        cotangents,
        placement,
        distribution,
        counts=counts,
        retain_graph=retain_graph,
        error=error,
    )
    wanted: list[Any] = originals(listed)
    return tuple(rows[parameter] for parameter in wanted)
