"""``backward``: Jacobians of tensors into the ``.jac`` of what they depend on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from jddist.aggregation import Aggregator
from jddist.distribution.base import Distribution

from ._accumulate import add_jacs, check_expects_gradients, free_jacs, jac_of
from ._arguments import as_cotangents, as_tensors
from ._context import default_inputs, involved_distribution, stated_objectives
from ._differentiate import check_chunk_size, vjp_rows
from ._jac_to_grad import aggregate_groups


def backward(
    tensors: Sequence[Tensor] | Tensor,
    aggregator: Aggregator | None = None,
    /,
    *,
    jac_tensors: Sequence[Tensor] | Tensor | None = None,
    inputs: Iterable[Tensor] | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
    distribution: Distribution | None = None,
) -> None:
    """Adds the Jacobian of all elements of ``tensors`` to the ``.jac`` of the inputs.

    Over several ranks ``.jac`` holds this rank's rows (or its estimate of the rows), without any
    communication; ``jac_to_grad`` communicates.

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
        distribution: ``Local()`` if every rank is meant to work alone.

    Raises:
        ValueError: An argument is not as described; or several ranks run and ``attach`` was not
            told where the objectives live.
        UnattachedParameterError: Several ranks run and an input belongs to no attached model.
    """
    given = [tensors] if isinstance(tensors, Tensor) else tensors
    distribution = involved_distribution(given, distribution)
    placement = stated_objectives(distribution)
    error: Exception | None = None
    found: list[Tensor] = []
    before: list[Tensor | None] = []
    try:
        outputs = as_tensors(tensors, "tensors")
        if inputs is None:
            found = default_inputs(outputs, distribution)
        else:
            found = list(dict.fromkeys(inputs))
        check_chunk_size(parallel_chunk_size)
        check_expects_gradients(found, ".jac")
        cotangents = as_cotangents(outputs, jac_tensors, "jac_tensors", "tensors")
        with distribution.first_pass():
            rows = vjp_rows(
                outputs,
                found,
                cotangents,
                retain_graph=retain_graph,
                chunk_size=parallel_chunk_size,
            )
        if aggregator is not None:
            before = [None if (jac := jac_of(t)) is None else jac.clone() for t in found]
        add_jacs(found, rows)
        for tensor in found:
            distribution.row_placements[tensor] = placement
    except Exception as failure:
        # With an aggregator the other ranks wait for this one, and have to hear of it.
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
