"""``jac_to_grad`` on several ranks: agree on the rows there are, then aggregate column shards."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.distributed.tensor import Placement

from jddist._observing import Observers, Weighed
from jddist._progress import enter
from jddist.aggregation import Aggregator, GramianWeightedAggregator
from jddist.aggregation._columns import settings_of
from jddist.aggregation._losses import stated_losses
from jddist.aggregation._memory import needs_order
from jddist.distribution.base import POSSIBLE_PLACEMENTS, Distribution, is_sharded
from jddist.distribution.columns import check_acts_on_columns
from jddist.distribution.cut import COLUMNS, ColumnCut, check_is_cut
from jddist.distribution.reorder import ColumnOrder
from jddist.distribution.select import originals
from jddist.distribution.shared_out import fingerprint
from jddist.distribution.whole import numel_of
from jddist.errors import LayoutMismatchError

from ._accumulate import add_grads, free_jacs, jac_of
from ._arguments import check_same_rows
from ._groups import (
    call_aggregator,
    check_all_have_jac,
    check_can_skip_concatenation,
    check_distinct,
    check_group,
    shaped,
)
from ._observed import combines, record_of
from ._sharded import RowGroup, aggregate


def aggregate_over_ranks(
    groups: list[list[Tensor]],
    aggregators: list[Aggregator],
    retain_jac: bool,
    by_gramian: bool,
    distribution: Distribution,
    error: Exception | None,
    observers: Observers,
) -> list[Tensor | None]:
    """Aggregates all groups over all ranks; what fails before the exchange fails everywhere.

    Args:
        groups: Tensors, some of which may have no ``.jac`` on this rank.
        aggregators: One for each group.
        retain_jac: Whether to keep the ``.jac``.
        by_gramian: Whether the aggregators must look at nothing but the Gramian.
        distribution: The ranks.
        error: What this rank already ran into, for the others to hear.
        observers: Who watches.

    Returns:
        For each group the weights, or None.
    """
    if distribution.shards_columns:
        groups = [originals(group) for group in groups]
    agree: dict[str, object] = {}
    orders: dict[int, ColumnOrder] = {}
    info: dict[str, list[object]] = {"rows": [], "present": [], "placement": [], "shared": []}
    try:
        if error is not None:
            raise error
        check_distinct(groups)
        for i, (group, aggregator) in enumerate(zip(groups, aggregators, strict=True)):
            check_group(group, i)
            check_acts_on_columns(aggregator)
            if by_gramian:
                check_can_skip_concatenation(aggregator)
            jacs = [jac_of(t) for t in group]
            if distribution.shards_columns:
                check_is_cut(group, jacs)
                if needs_order(aggregator):
                    orders[i] = ColumnOrder(group, distribution.columns)
            check_same_rows([j for j in jacs if j is not None], "tensors.jac")
            placement = _placement_of(group, distribution)
            info["present"].append([j is not None for j in jacs])
            info["rows"].append(next((len(j) for j in jacs if j is not None), None))
            info["placement"].append(None if placement is None else repr(placement))
            info["shared"].append(_to_share_out(aggregator))
        names = [[distribution.names.get(t, "?") for t in group] for group in groups]
        digest = hashlib.blake2b(repr(names).encode(), digest_size=8).hexdigest()
        agree = {
            "parameters of the groups": f"{[len(g) for g in names]} with digest {digest}",
            "aggregators": [type(a).__name__ for a in aggregators],
            "settings of the aggregators": [shared_settings(a) for a in aggregators],
            "losses stated to aggregators": [stated_losses(a) for a in aggregators],
            "dtypes": sorted({str(t.dtype) for group in groups for t in group}),
        }
    except Exception as failure:  # raised again on every rank, by the handshake
        error = failure
    infos = distribution.handshake("jac_to_grad", agree, info, error)
    row_groups = []
    for i, (group, aggregator) in enumerate(zip(groups, aggregators, strict=True)):
        present = [any(of_rank) for of_rank in zip(*(x["present"][i] for x in infos), strict=True)]
        check_all_have_jac(group, i, present, distribution)
        placement = _agreed_placement([x["placement"][i] for x in infos])
        counts = _row_counts([x["rows"][i] for x in infos], placement)
        count = counts[distribution.group.rank]
        cut = None
        if distribution.shards_columns:
            cut = ColumnCut(group, distribution.columns)
            rows = cut.columns([jac_of(t) for t in group], count, _common_dtype(group))
        else:
            rows = _local_rows(group, count)
        prints = {x["shared"][i] for x in infos}
        shared_out = len(prints) == 1 and None not in prints
        row_groups.append(
            RowGroup(rows, counts, placement, aggregator, cut, orders.get(i), shared_out)
        )
        if not retain_jac:
            free_jacs(group)
    results = aggregate(row_groups, distribution, call_aggregator, observers)
    enter("forward")
    for group, row_group, (vector, _) in zip(groups, row_groups, results, strict=True):
        if row_group.cut is not None:
            add_grads(group, row_group.cut.gradients(vector), distribution)
        else:
            parts = vector.split([numel_of(t) for t in group])
            add_grads(group, shaped(parts, group), distribution)
    if observers:
        found = [
            Weighed("", g.gramian if combines(g.aggregator) else None, weights)
            for g, (_, weights) in zip(row_groups, results, strict=True)
        ]
        placements = {g.placement for g in row_groups}
        stated = placements.pop() if len(placements) == 1 else None
        if stated == COLUMNS:
            stated = distribution.objectives
        observers.ends(record_of(groups, found, stated, distribution))
    return [weights for _, weights in results]


def _to_share_out(aggregator: Aggregator) -> str | None:
    """By what ranks know that any of them may run the weighting for all."""
    if not isinstance(aggregator, GramianWeightedAggregator):
        return None
    return fingerprint(aggregator.gramian_weighting)


def shared_settings(aggregator: Aggregator) -> list[object]:
    """What every rank uses by itself. Weightings of Gramians run on rank 0: its settings count."""
    return [] if isinstance(aggregator, GramianWeightedAggregator) else settings_of(aggregator)


def _local_rows(group: list[Tensor], count: int) -> Tensor:
    """This rank's rows [m_r, n]; zeros for tensors without any."""
    dtype = _common_dtype(group)
    pieces = []
    for tensor in group:
        jac = jac_of(tensor)
        if jac is None:
            pieces.append(tensor.new_zeros(count, numel_of(tensor), dtype=dtype))
        else:
            pieces.append(jac.detach().reshape(count, numel_of(tensor)).to(dtype))
    return torch.cat(pieces, dim=1)


def _common_dtype(group: list[Tensor]) -> torch.dtype:
    dtype = group[0].dtype
    for tensor in group[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _placement_of(group: list[Tensor], distribution: Distribution) -> Placement | None:
    """Where the rows of a group live; None if this rank has none."""
    if distribution.shards_columns:
        return COLUMNS
    found: dict[str, Placement] = {}
    for tensor in group:
        if jac_of(tensor) is None:
            continue
        placement = distribution.row_placements.get(tensor, distribution.objectives)
        if placement is None:
            raise ValueError(
                "Found a .jac that was not computed by jddist, on several ranks; expected to know "
                "where its rows live. Call jddist.attach(model, objectives=...) to say so."
            )
        found[repr(placement)] = placement
    if len(found) > 1:
        raise ValueError(
            f"Found rows placed as {sorted(found)} in one group; expected one placement. Aggregate "
            "the Jacobians of backward and of mtl_backward separately."
        )
    return next(iter(found.values()), None)


def _agreed_placement(described: list[str | None]) -> Placement:
    stated = sorted({d for d in described if d is not None})
    if len(stated) != 1:
        raise LayoutMismatchError(
            f"Found rows placed as {stated} on the ranks; expected the same placement everywhere."
        )
    return next(p for p in (*POSSIBLE_PLACEMENTS, COLUMNS) if repr(p) == stated[0])


def _row_counts(rows: list[int | None], placement: Placement) -> list[int]:
    """m_r of each rank, or the common m of all."""
    if is_sharded(placement):
        return [count or 0 for count in rows]
    known = {count for count in rows if count is not None}
    if len(known) > 1:
        listed = ", ".join(f"rank {rank}: {count}" for rank, count in enumerate(rows))
        raise LayoutMismatchError(
            f"Found different numbers of rows on the ranks ({listed}); expected the same "
            "objectives on every rank."
        )
    return [known.pop()] * len(rows)
