"""What ``jac_to_grad`` tells those who watch the steps of its aggregators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import Placement

from jddist._observing import Observers, StepRecord, Weighed
from jddist.aggregation import Aggregator, GramianWeightedAggregator, WeightedAggregator
from jddist.distribution.base import Distribution, is_sharded
from jddist.linalg.gramian import compute_gramian


@contextmanager
def seen_gramian(aggregator: Aggregator, observers: Observers) -> Iterator[list[Tensor]]:
    """Within this context, the Gramian that the aggregator's weighting is called on is added to
    the list, and the observers hear of the weighting."""
    seen: list[Tensor] = []
    if not observers:
        yield seen
        return
    if not isinstance(aggregator, GramianWeightedAggregator):
        observers.weighs([aggregator])
        yield seen
        observers.weighed([aggregator])
        return
    weighting = aggregator.gramian_weighting

    def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        observers.gramian_known()
        observers.weighs([weighting])

    def after(_module: nn.Module, _inputs: object, _weights: Tensor) -> None:
        observers.weighed([weighting])

    handles = [
        weighting.register_forward_pre_hook(before),
        weighting.register_forward_hook(after),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def weighed(
    aggregator: Aggregator,
    matrix: Tensor,
    vector: Tensor,
    weights: Tensor | None,
    gramians: Sequence[Tensor],
    observers: Observers,
) -> Weighed | None:
    """What one process knows of a group whose whole Jacobian is at hand, or None unless asked.

    Args:
        aggregator: What aggregated it.
        matrix: The Jacobian [m, n].
        vector: The result [n].
        weights: The weights [m], if there are any.
        gramians: The Gramian, if one was formed.
        observers: Who asks.
    """
    if not observers:
        return None
    gramian = gramians[-1] if gramians else None
    if combines(aggregator) and gramian is not None:
        return Weighed("", gramian, weights)
    if not observers.wants_gramian():
        return Weighed("", None, weights)
    if gramian is None:
        gramian = compute_gramian(matrix)
    return Weighed("", gramian, weights, matrix @ vector, float(vector.norm()))


def combines(aggregator: Aggregator) -> bool:
    """Whether the result is the weighted sum of the rows, and no more than that."""
    return type(aggregator).forward is WeightedAggregator.forward


def record_of(
    groups: Sequence[Sequence[Tensor]],
    weighed_groups: Sequence[Weighed],
    placement: Placement | None,
    distribution: Distribution,
) -> StepRecord:
    """A step of all groups.

    Args:
        groups: The tensors of each.
        weighed_groups: What is known of each.
        placement: Where the rows live, if that is known.
        distribution: The ranks.
    """
    names = _names(groups, distribution)
    return StepRecord(
        tuple(
            Weighed(name, w.gramian, w.weights, w.progress, w.update_norm)
            for name, w in zip(names, weighed_groups, strict=True)
        ),
        per_sample=None if placement is None else is_sharded(placement),
        rank=distribution.group.rank,
        num_ranks=distribution.group.size,
    )


def _names(groups: Sequence[Sequence[Tensor]], distribution: Distribution) -> list[str]:
    """What the names of a group's parameters begin with; "" for one group of all."""
    if len(groups) == 1:
        return [""]
    found = []
    for index, group in enumerate(groups):
        names = [distribution.names.get(tensor) for tensor in group]
        known = [name.split(".") for name in names if name is not None]
        common = []
        for parts in zip(*known, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        found.append(".".join(common) or f"group {index}")
    return found if len(set(found)) == len(found) else [f"group {i}" for i in range(len(groups))]
