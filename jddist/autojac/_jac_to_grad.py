"""``jac_to_grad``: from ``.jac`` to ``.grad`` by an aggregator, for one or many groups."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement

from jddist._stateful import Stateful
from jddist.aggregation import Aggregator, GramianWeightedAggregator, WeightedAggregator
from jddist.distribution.base import POSSIBLE_PLACEMENTS, Distribution, is_sharded
from jddist.distribution.select import distribution_of
from jddist.errors import LayoutMismatchError, NonFiniteObjectiveError
from jddist.linalg.gramian import compute_gramian

from ._accumulate import add_grads, check_expects_gradients, free_jacs, jac_of
from ._arguments import check_same_rows
from ._sharded import RowGroup, aggregate, check_aggregator


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
    all-gather brings the gradient together. Tensors without ``.jac`` on this rank count as zero
    rows if another rank has some.

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


def jac_to_grad_groups(
    groups: Sequence[Iterable[Tensor]],
    aggregators: Sequence[Aggregator],
    *,
    retain_jac: bool = False,
    distribution: Distribution | None = None,
) -> list[Tensor | None]:
    """``jac_to_grad`` for many groups at once: one all-reduce of all Gramians, one broadcast.

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
    if len(groups) != len(aggregators):
        raise ValueError(
            f"Found {len(aggregators)} aggregators for {len(groups)} groups; expected one each."
        )
    _check_no_shared_state(aggregators)
    listed = [list(group) for group in groups]
    return aggregate_groups(
        listed, list(aggregators), retain_jac=retain_jac, distribution=distribution
    )


def _check_no_shared_state(aggregators: Sequence[Aggregator]) -> None:
    """Raises ValueError if one stateful object, such as a weighting, serves several groups."""
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
    if distribution.group.size > 1:
        return _over_ranks(groups, aggregators, retain_jac, by_gramian, distribution, error)
    _check_distinct(groups)
    for i, (group, aggregator) in enumerate(zip(groups, aggregators, strict=True)):
        _check_group(group, i)
        _check_all_have_jac(group, i, [jac_of(t) is not None for t in group])
        check_same_rows([_present_jac(t) for t in group], "tensors.jac")
        _check_finite(group)
        if by_gramian:
            check_can_skip_concatenation(aggregator)
    results = [
        _in_one_process(group, aggregator, retain_jac, by_gramian)
        for group, aggregator in zip(groups, aggregators, strict=True)
    ]
    for group, (vectors, _) in zip(groups, results, strict=True):
        add_grads(group, _shaped(vectors, group))
    return [weights for _, weights in results]


def call_aggregator(aggregator: Aggregator, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """The vector [n] and, of a WeightedAggregator, the weights [m] after all of its hooks."""
    if not isinstance(aggregator, WeightedAggregator):
        return aggregator(matrix), None
    captured: list[Tensor] = []

    def capture(_module: nn.Module, _args: object, output: Tensor) -> None:
        captured.append(output)

    handle = aggregator.weighting.register_forward_hook(capture)  # last: after the user's hooks
    try:
        vector = aggregator(matrix)
    finally:
        handle.remove()
    return vector, captured[-1] if captured else None


def _check_finite(group: list[Tensor]) -> None:
    rows = [_present_jac(t).reshape(len(_present_jac(t)), t.numel()) for t in group]
    finite = torch.stack([torch.isfinite(r).all(dim=1) for r in rows]).all(dim=0)
    if not bool(finite.all()):
        bad = ", ".join(f"objective {i}" for i in (~finite).nonzero().flatten().tolist()[:8])
        raise NonFiniteObjectiveError(
            f"Found NaN or infinity in the rows of {bad}; expected finite rows. No .grad was "
            "written. Lower the learning rate, or look at the data."
        )


def _in_one_process(
    group: list[Tensor], aggregator: Aggregator, retain_jac: bool, by_gramian: bool
) -> tuple[Sequence[Tensor], Tensor | None]:
    """A vector for each tensor, and the weights, if any. Nothing is written."""
    rows = deque(_present_jac(t).reshape(len(_present_jac(t)), t.numel()) for t in group)
    if not retain_jac:
        free_jacs(group)
    if not by_gramian:
        matrix = torch.cat(list(rows), dim=1)
        rows.clear()
        vector, weights = call_aggregator(aggregator, matrix)
        return vector.split([t.numel() for t in group]), weights
    assert isinstance(aggregator, GramianWeightedAggregator)
    gramian: Tensor = compute_gramian(rows[0])
    for other in list(rows)[1:]:
        gramian = gramian + compute_gramian(other)
    weights = aggregator.gramian_weighting(gramian)
    vectors = []
    while rows:  # each row block is let go as soon as it was used
        block = rows.popleft()
        vectors.append(weights.to(block.dtype) @ block)
    return vectors, weights


def check_can_skip_concatenation(aggregator: Aggregator) -> None:
    """Raises ValueError unless the Gramian is all that the aggregator, hooks included, looks at."""
    suitable = isinstance(aggregator, GramianWeightedAggregator) and not any(
        module._forward_hooks or module._forward_pre_hooks
        for module in (aggregator, aggregator.weighting)
    )
    if not suitable:
        raise ValueError(
            f"Found {type(aggregator).__name__} with optimize_gramian_computation=True; expected a "
            "GramianWeightedAggregator without forward hooks (on itself or its weighting), since "
            "the Jacobian is never formed. Pass optimize_gramian_computation=False."
        )


def _over_ranks(
    groups: list[list[Tensor]],
    aggregators: list[Aggregator],
    retain_jac: bool,
    by_gramian: bool,
    distribution: Distribution,
    error: Exception | None,
) -> list[Tensor | None]:
    agree: dict[str, object] = {}
    info: dict[str, list[object]] = {"rows": [], "present": [], "placement": []}
    try:
        if error is not None:
            raise error
        _check_distinct(groups)
        for i, (group, aggregator) in enumerate(zip(groups, aggregators, strict=True)):
            _check_group(group, i)
            check_aggregator(aggregator)
            if by_gramian:
                check_can_skip_concatenation(aggregator)
            jacs = [jac_of(t) for t in group]
            check_same_rows([j for j in jacs if j is not None], "tensors.jac")
            placement = _placement_of(group, distribution)
            info["present"].append([j is not None for j in jacs])
            info["rows"].append(next((len(j) for j in jacs if j is not None), None))
            info["placement"].append(None if placement is None else repr(placement))
        names = [[distribution.names.get(t, "?") for t in group] for group in groups]
        digest = hashlib.blake2b(repr(names).encode(), digest_size=8).hexdigest()
        agree = {
            "parameters of the groups": f"{[len(g) for g in names]} with digest {digest}",
            "aggregators": [type(a).__name__ for a in aggregators],
            "dtypes": sorted({str(t.dtype) for group in groups for t in group}),
        }
    except Exception as failure:  # raised again on every rank, by the handshake
        error = failure
    infos = distribution.handshake("jac_to_grad", agree, info, error)
    row_groups = []
    for i, (group, aggregator) in enumerate(zip(groups, aggregators, strict=True)):
        present = [any(of_rank) for of_rank in zip(*(x["present"][i] for x in infos), strict=True)]
        _check_all_have_jac(group, i, present, distribution)
        placement = _agreed_placement([x["placement"][i] for x in infos])
        counts = _row_counts([x["rows"][i] for x in infos], placement)
        rows = _local_rows(group, counts[distribution.group.rank])
        row_groups.append(RowGroup(rows, counts, placement, aggregator))
        if not retain_jac:
            free_jacs(group)
    results = aggregate(row_groups, distribution, call_aggregator)
    for group, (vector, _) in zip(groups, results, strict=True):
        add_grads(group, _shaped(vector.split([t.numel() for t in group]), group))
    return [weights for _, weights in results]


def _local_rows(group: list[Tensor], count: int) -> Tensor:
    """This rank's rows [m_r, n]; zeros for tensors without any."""
    dtype = group[0].dtype
    for tensor in group[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    pieces = []
    for tensor in group:
        jac = jac_of(tensor)
        if jac is None:
            pieces.append(tensor.new_zeros(count, tensor.numel(), dtype=dtype))
        else:
            pieces.append(jac.detach().reshape(count, tensor.numel()).to(dtype))
    return torch.cat(pieces, dim=1)


def _placement_of(group: list[Tensor], distribution: Distribution) -> Placement | None:
    """Where the rows of a group live; None if this rank has none."""
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
    return next(p for p in POSSIBLE_PLACEMENTS if repr(p) == stated[0])


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


def _check_distinct(groups: list[list[Tensor]]) -> None:
    seen: dict[Tensor, int] = {}
    for i, group in enumerate(groups):
        for tensor in group:
            if tensor in seen:
                where = f"group {i}" if seen[tensor] == i else f"the groups {seen[tensor]} and {i}"
                raise ValueError(
                    f"Found a tensor of shape {tuple(tensor.shape)} more than once in {where}; "
                    "expected each once, since its .jac is aggregated once."
                )
            seen[tensor] = i


def _check_group(group: list[Tensor], index: int) -> None:
    if not group:
        raise ValueError(
            f"Found no tensors in group {index}; expected some. (A generator that was used up?)"
        )
    check_expects_gradients(group, ".grad")


def _check_all_have_jac(
    group: list[Tensor],
    index: int,
    present: Sequence[bool],
    distribution: Distribution | None = None,
) -> None:
    missing = [
        f"{_name(tensor, distribution)}{i} of shape {tuple(tensor.shape)}"
        for i, (tensor, there) in enumerate(zip(group, present, strict=True))
        if not there
    ]
    if missing:
        raise ValueError(
            f"Found tensors without .jac in group {index}: {', '.join(missing)}; expected all to "
            "have one. Call backward or mtl_backward first, or leave them out."
        )


def _name(tensor: Tensor, distribution: Distribution | None) -> str:
    name = None if distribution is None else distribution.names.get(tensor)
    return f"{name}: " if name else ""


def _present_jac(tensor: Tensor) -> Tensor:
    jac = jac_of(tensor)
    assert jac is not None
    return jac


def _shaped(vectors: Sequence[Tensor], group: Sequence[Tensor]) -> list[Tensor]:
    return [v.reshape(t.shape).to(t.dtype) for v, t in zip(vectors, group, strict=True)]
