"""``attach``: tells jddist how a wrapped model's parameters are distributed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed.tensor import Placement, Shard

from jddist.errors import UnattachedParameterError

from .base import Distribution, Reshard, check_reshard
from .local import Local
from .select import is_engine, num_ranks, select


def attach(
    model: nn.Module,
    *,
    objectives: Placement | None = None,
    batch_dim: int | None = None,
    weighting: Callable[[Tensor], Tensor] | None = None,
    reshard: Reshard = "memory",
) -> Distribution:
    """Makes ``mtl_backward``, ``backward``, ``jac`` and ``jac_to_grad`` global for a model.

    Args:
        model: The wrapped model (in DistributedDataParallel or fully_shard, as a whole or in
            parts), one with layers of parallelize_module, in fully_shard or not, a DeepSpeed
            engine, or a plain model in a single process. Every rank has to call, since a group for
            small messages may be created.
        objectives: Where the rows of the Jacobian live: ``Shard(0)`` if every rank has objectives
            of its own, ``Partial("avg")`` or ``Partial("sum")`` if every rank has an estimate of
            the same objectives. ``backward`` and ``jac`` need it on several ranks;
            ``mtl_backward`` is always ``Partial``. ``Shard(0)`` by default with a ``batch_dim``.
        batch_dim: The dimension of the samples in the tensor of losses, if they are objectives.
        weighting: For a DeepSpeed engine, whose own ``backward`` then takes a tensor of losses: the
            weighting of their Gramian. See :func:`jddist.integrations.deepspeed.attach`.
        reshard: How rows of tasks are differentiated towards parameters in fully_shard, by one
            backward pass for each task. "memory": every pass gathers the parameters that the
            wrapper reshards, so that no rank holds more of them than in an ordinary backward.
            "speed": they are gathered once and stay whole until the last pass, which takes n
            numbers more on every rank, n being the number of parameters. The same on every rank.

    Returns:
        The distribution; its ``detach()`` undoes the call.

    Raises:
        UnsupportedModelError: The wrapper is not supported.
        UnattachedParameterError: Several ranks run and the model is not wrapped.
        ValueError: ``objectives`` is no placement that rows can have, or there is a weighting, or
            ``reshard`` is neither of the two.
    """
    if weighting is not None and is_engine(model):
        from jddist.integrations.deepspeed import attach as attach_engine

        return attach_engine(model, weighting=weighting, batch_dim=batch_dim, objectives=objectives)
    if weighting is not None:
        raise ValueError(
            f"Found weighting={weighting!r} with a {type(model).__name__}; expected None, since "
            "its losses are not differentiated by the wrapper. Pass the weighting to "
            "Engine.backward, or an aggregator to jac_to_grad."
        )
    if objectives is None and batch_dim is not None:
        objectives = Shard(0)
    check_reshard(reshard)
    distribution = select([model], objectives)
    if distribution is None:
        if num_ranks() > 1:
            raise UnattachedParameterError(
                f"Found a plain {type(model).__name__} while {num_ranks()} ranks run; expected a "
                "wrapper that says how its parameters are distributed. Wrap it in "
                "DistributedDataParallel or call fully_shard on it first."
            )
        distribution = Local(objectives)
        distribution.register(model)
    distribution.reshard = reshard
    return distribution
