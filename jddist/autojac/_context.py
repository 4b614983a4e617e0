"""What autojac asks about ranks: whose parameters these are, and where the rows live."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import Partial, Placement, Shard
from torch.nn.parameter import Parameter

from jddist.distribution.base import Distribution
from jddist.distribution.select import distribution_of, originals

from ._graph import leaves_of


def involved_distribution(tensors: Sequence[Tensor], given: Distribution | None) -> Distribution:
    """The distribution of the parameters that tensors depend on; no argument is checked here.

    Raises:
        UnattachedParameterError: Several ranks run and a parameter is not attached.
    """
    graphs = [t for t in tensors if isinstance(t, Tensor) and t.grad_fn is not None]
    # Other leaves are inputs that were asked for a gradient, as physics-informed losses do.
    return distribution_of([p for p in leaves_of(graphs) if isinstance(p, Parameter)], given)


def default_inputs(
    tensors: Sequence[Tensor], distribution: Distribution, *, excluded: Sequence[Tensor] = ()
) -> list[Tensor]:
    """The leaves to differentiate towards: on several ranks the attached parameters alone."""
    leaves = leaves_of(tensors, excluded=excluded)
    if distribution.shards_columns:
        return [leaf for leaf in originals(leaves) if leaf in distribution.names]
    if distribution.group.size == 1:
        return leaves
    return [leaf for leaf in leaves if leaf in distribution.names]


def stated_objectives(distribution: Distribution) -> Placement:
    """Where the rows of ``backward`` and ``jac`` live.

    Raises:
        ValueError: Several ranks run and it was not stated.
    """
    if distribution.objectives is not None:
        return distribution.objectives
    if distribution.group.size > 1:
        raise ValueError(
            f"Found parameters on {distribution.group.size} ranks and no statement of where the "
            "rows of the Jacobian live; expected one, since sample k of one rank must not be "
            "merged with sample k of another. Call jddist.attach(model, objectives=Shard(0)) if "
            'every rank has objectives of its own, or objectives=Partial("avg") if every rank has '
            "an estimate of the same objectives."
        )
    return Shard(0)


def task_placement(distribution: Distribution) -> Placement:
    """Where the rows of ``mtl_backward`` live: estimates of the same rows, on every rank."""
    stated = distribution.objectives
    return stated if isinstance(stated, Partial) else Partial("avg")
