"""``jac_to_grad``: from ``.jac`` to ``.grad`` by an aggregator, for one or many groups."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from jddist._autocast import without_autocast
from jddist._observing import Observers, Weighed, observers_of
from jddist._stateful import Stateful
from jddist.aggregation import Aggregator, GramianWeightedAggregator
from jddist.aggregation._bases import combine
from jddist.distribution.base import Distribution
from jddist.distribution.select import distribution_of
from jddist.distribution.whole import numel_of
from jddist.errors import NonFiniteObjectiveError
from jddist.linalg.gramian import compute_gramian

from ._accumulate import add_grads, free_jacs, jac_of
from ._arguments import check_same_rows
from ._groups import (
    call_aggregator,
    check_all_have_jac,
    check_can_skip_concatenation,
    check_distinct,
    check_group,
    present_jac,
    shaped,
)
from ._observed import record_of, seen_gramian, weighed
from ._over_ranks import aggregate_over_ranks


@without_autocast()
def jac_to_grad(
    tensors: Iterable[Tensor],
    /,
    aggregator: Aggregator,
    *,
    retain_jac: bool = False,
    optimize_gramian_computation: bool = False,
    distribution: Distribution | None = None,
) -> Tensor | None:
    """Aggregates the ``.jac`` of some tensors and adds the result to their ``.grad``.

    Over several ranks the result is that of one process with all rows, identical on all ranks: the
    rows become column shards, one all-reduce sums the m x m Gramian, rank 0 weighs it, and one
    all-gather brings the gradient together. The rows of sharded parameters are column shards
    already, and their gradients stay where they are, in the parameters' placements. Tensors without
    ``.jac`` on this rank count as zero rows if another rank has some.

    Args:
        tensors: Tensors whose ``.jac`` [m, *shape] have the same number of rows.
        aggregator: Maps the Jacobian [m, n] to a vector [n].
        retain_jac: Whether to keep the ``.jac``.
        optimize_gramian_computation: In one process, add up the tensors' Gramians instead of
            concatenating their Jacobians: half the memory. (Several ranks never concatenate more
            than a shard.) The aggregator must depend on the Gramian alone and have no hooks.
        distribution: ``Local()`` if every rank is meant to work alone.

    Returns:
        The weights [m] of the rows if the aggregator has any (a WeightedAggregator), else None.

    Raises:
        ValueError: A tensor has no ``.jac``, or the numbers of rows differ, or the aggregator
            cannot do what was asked.
        NonFiniteObjectiveError: A row is NaN or infinite.
        UnattachedParameterError: Several ranks run and a tensor belongs to no attached model.
    """
    return aggregate_groups(
        [list(tensors)],
        [aggregator],
        retain_jac=retain_jac,
        by_gramian=optimize_gramian_computation,
        distribution=distribution,
    )[0]


@without_autocast()
def jac_to_grad_groups(
    groups: Sequence[Iterable[Tensor]],
    aggregators: Sequence[Aggregator],
    *,
    retain_jac: bool = False,
    distribution: Distribution | None = None,
) -> list[Tensor | None]:
    """``jac_to_grad`` for many groups at once: one all-reduce of all Gramians, one broadcast.

    Aggregators that need more than the Gramian (ExcessMTL, MoCo, DBMTL) add their own. Of random
    ones, the weightings of Gramians draw first and the others after them, in the groups' order.

    Args:
        groups: Groups of tensors, such as ``jddist.grouping`` makes them.
        aggregators: One for each group. A stateful one must not serve two groups.
        retain_jac: Whether to keep the ``.jac``.
        distribution: ``Local()`` if every rank is meant to work alone.

    Returns:
        For each group the weights of its rows, or None.

    Raises:
        ValueError: As ``jac_to_grad``; or the lengths differ; or a stateful aggregator is shared.
    """
    listed = [list(group) for group in groups]
    error: Exception | None = None
    try:
        _check_aggregators(aggregators, len(listed))
    except ValueError as failure:  # the other ranks have to hear of it
        error = failure
    return aggregate_groups(
        listed, list(aggregators), retain_jac=retain_jac, distribution=distribution, error=error
    )


def _check_aggregators(aggregators: Sequence[Aggregator], num_groups: int) -> None:
    """Raises ValueError unless there is one for each group and no stateful module serves two."""
    if len(aggregators) != num_groups:
        raise ValueError(
            f"Found {len(aggregators)} aggregators for {num_groups} groups; expected one each."
        )
    seen: set[nn.Module] = set()
    for aggregator in aggregators:
        stateful = {module for module in aggregator.modules() if isinstance(module, Stateful)}
        if stateful & seen:
            name = type((stateful & seen).pop()).__name__
            raise ValueError(
                f"Found one {name} for several groups; expected an instance for each, since it "
                "remembers earlier Jacobians."
            )
        seen |= stateful


@torch.no_grad()  # weights of the user's may require a gradient; .grad is not to have a graph
def aggregate_groups(
    groups: list[list[Tensor]],
    aggregators: list[Aggregator],
    *,
    retain_jac: bool = False,
    by_gramian: bool = False,
    distribution: Distribution | None = None,
    error: Exception | None = None,
) -> list[Tensor | None]:
    """Aggregates all groups.

    Args:
        groups: Tensors with ``.jac``.
        aggregators: One for each group.
        retain_jac: Whether to keep the ``.jac``.
        by_gramian: Whether not to concatenate Jacobians.
        distribution: The ranks, if known.
        error: What this rank already ran into, for the others to hear.
    """
    distribution = distribution_of([t for group in groups for t in group], distribution)
    observers = observers_of(aggregators)
    observers.begins()
    if distribution.group.size > 1 or distribution.shards_columns:
        return aggregate_over_ranks(
            groups, aggregators, retain_jac, by_gramian, distribution, error, observers
        )
    if error is not None:
        raise error
    check_distinct(groups)
    for i, (group, aggregator) in enumerate(zip(groups, aggregators, strict=True)):
        check_group(group, i)
        check_all_have_jac(group, i, [jac_of(t) is not None for t in group])
        check_same_rows([present_jac(t) for t in group], "tensors.jac")
        _check_finite(group)
        if by_gramian:
            check_can_skip_concatenation(aggregator)
    # Weightings of Gramians go first, as they do over several ranks: the draws are the same then.
    by_turn = sorted(
        range(len(groups)), key=lambda i: not isinstance(aggregators[i], GramianWeightedAggregator)
    )
    results = {
        i: _in_one_process(groups[i], aggregators[i], retain_jac, by_gramian, observers)
        for i in by_turn
    }
    for i, group in enumerate(groups):
        add_grads(group, shaped(results[i][0], group), distribution)
    if observers:
        found = [
            seen for _, _, seen in (results[i] for i in range(len(groups))) if seen is not None
        ]
        observers.ends(record_of(groups, found, distribution.objectives, distribution))
    return [results[i][1] for i in range(len(groups))]


def _check_finite(group: list[Tensor]) -> None:
    rows = [present_jac(t).reshape(len(present_jac(t)), numel_of(t)) for t in group]
    finite = torch.stack([torch.isfinite(r).all(dim=1) for r in rows]).all(dim=0)
    if not bool(finite.all()):
        bad = ", ".join(f"objective {i}" for i in (~finite).nonzero().flatten().tolist()[:8])
        raise NonFiniteObjectiveError(
            f"Found NaN or infinity in the rows of {bad}; expected finite rows. No .grad was "
            "written. Lower the learning rate, or look at the data."
        )


def _in_one_process(
    group: list[Tensor],
    aggregator: Aggregator,
    retain_jac: bool,
    by_gramian: bool,
    observers: Observers,
) -> tuple[Sequence[Tensor], Tensor | None, Weighed | None]:
    """A vector for each tensor, the weights, if any, and what observers are told. Nothing is
    written."""
    rows = deque(present_jac(t).reshape(len(present_jac(t)), numel_of(t)) for t in group)
    if not retain_jac:
        free_jacs(group)
    if not by_gramian:
        matrix = torch.cat(list(rows), dim=1)
        rows.clear()
        with seen_gramian(aggregator, observers) as seen:
            vector, weights = call_aggregator(aggregator, matrix)
        told = weighed(aggregator, matrix, vector, weights, seen, observers)
        return vector.split([numel_of(t) for t in group]), weights, told
    assert isinstance(aggregator, GramianWeightedAggregator)
    gramian: Tensor = compute_gramian(rows[0])
    for other in list(rows)[1:]:
        gramian = gramian + compute_gramian(other)
    with seen_gramian(aggregator, observers):
        weights = aggregator.gramian_weighting(gramian)
    vectors = []
    while rows:  # each row block is let go as soon as it was used
        block = rows.popleft()
        vectors.append(combine(weights, block))
    return vectors, weights, Weighed("", gramian, weights) if observers else None
