"""What autojac asks about ranks: whose parameters these are, and where the rows live."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import Partial, Placement, Shard

from jddist.distribution.base import Distribution
from jddist.distribution.select import distribution_of


def stated_objectives(
    inputs: Sequence[Tensor], given: Distribution | None
) -> tuple[Placement, Distribution]:
    """Where the rows of ``backward`` and ``jac`` live, which has to be stated on several ranks.

    Raises:
        ValueError: Several ranks run and it was not.
        UnattachedParameterError: Several ranks run and an input is not attached.
    """
    distribution = distribution_of(inputs, given)
    if distribution.objectives is not None:
        return distribution.objectives, distribution
    if distribution.group.size > 1:
        raise ValueError(
            f"Found parameters on {distribution.group.size} ranks and no statement of where the "
            "rows of the Jacobian live; expected one, since sample k of one rank must not be "
            "merged with sample k of another. Call jddist.attach(model, objectives=Shard(0)) if "
            'every rank has objectives of its own, or objectives=Partial("avg") if every rank has '
            "an estimate of the same objectives."
        )
    return Shard(0), distribution


def task_placement(distribution: Distribution) -> Placement:
    """Where the rows of ``mtl_backward`` live: estimates of the same rows, on every rank."""
    stated = distribution.objectives
    return stated if isinstance(stated, Partial) else Partial("avg")
