"""DeepSpeed: ``model_engine.backward(losses)`` with a vector of losses instead of a scalar.

The loop stays DeepSpeed's own::

    model_engine, *_ = deepspeed.initialize(model=model, config=config)
    jddist.attach(model_engine, weighting=UPGradWeighting(), batch_dim=0)
    for x, y in loader:
        losses = criterion(model_engine(x), y)  # one for each sample
        model_engine.backward(losses)
        model_engine.step()
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.distributed.tensor import Placement, Shard

from jddist.aggregation._weightings import check_takes_gramians
from jddist.autogram.engine import Engine
from jddist.distribution.base import Distribution
from jddist.distribution.counts import Count
from jddist.distribution.select import select
from jddist.distribution.zero import Zero
from jddist.errors import UnsupportedModelError

from ._extra import require

require("deepspeed", "deepspeed")


def attach(
    model_engine: Any,
    *,
    weighting: Callable[[Tensor], Tensor] | None = None,
    batch_dim: int | None = None,
    objectives: Placement | None = None,
    nonfinite: Literal["raise", "skip"] = "raise",
    public_only: bool | None = None,
) -> Distribution:
    """Attaches jddist to a DeepSpeed engine; ``jddist.attach`` is the same with fewer arguments.

    With a ``weighting``, ``model_engine.backward(losses)`` takes a tensor of losses of one
    dimension or more: it computes their Gramian, the weights on rank 0, and the weighted gradient
    by the engine's own backward, and returns the weights of all ranks' losses. It also takes
    ``count=``, as ``Engine.backward`` does. A scalar is differentiated as before. Without a
    weighting, use ``Engine(model_engine, ...)``, or ``mtl_backward`` and ``jac_to_grad``.

    Gradients of ``jac_to_grad`` and ``mtl_backward`` wait until ``model_engine.step()`` (or
    ``hand_over()`` of what this returns), since DeepSpeed takes one backward in a micro-step. Of
    several micro-steps (``gradient_accumulation_steps``) DeepSpeed takes the mean, each with
    weights of its own.

    Args:
        model_engine: The engine that ``deepspeed.initialize`` returned, before its next forward
            pass. Every rank has to call.
        weighting: A weighting or any callable on the Gramian.
        batch_dim: The dimension of the samples in the losses, if every sample is an objective.
        objectives: Where the objectives live; by default ``Shard(0)`` with a ``batch_dim``, else
            ``Partial("avg")``.
        nonfinite: See ``Engine``.
        public_only: Whether to do without DeepSpeed's internals: the forward pass then runs twice
            (with the same random numbers), ZeRO-3 is refused, and there are no rows for
            ``jac_to_grad``. None: only if this version of DeepSpeed was not tested.

    Returns:
        The distribution; its ``detach()`` leaves the engine as it was.

    Raises:
        UnsupportedModelError: The configuration of the engine or the version of DeepSpeed is not
            supported, or it is no engine.
        ValueError: ``objectives`` is no placement that rows can have, or the weighting needs the
            Jacobian itself.
    """
    if weighting is not None:
        check_takes_gramians(weighting)
    stated = objectives
    if stated is None and batch_dim is not None:
        stated = Shard(0)
    distribution = select([model_engine], stated, public_only=public_only)
    if not isinstance(distribution, Zero):
        raise UnsupportedModelError(
            f"Found a {type(model_engine).__name__}; expected the engine that "
            "deepspeed.initialize returns. Pass that, or use jddist.attach for other wrappers."
        )
    if weighting is None:
        return distribution
    engine = Engine(model_engine, batch_dim=batch_dim, objectives=objectives, nonfinite=nonfinite)
    zero = weakref.ref(distribution)

    def backward(
        loss: Tensor,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
        *,
        count: Count | None = None,
    ) -> Tensor:
        """``model_engine.backward`` of a tensor of losses."""
        owner = zero()
        assert owner is not None
        with owner.dividing_by_steps(scale_wrt_gas):
            return engine.backward(loss, weighting, count=count, retain_graph=retain_graph)

    distribution.methods.takes_losses = backward
    return distribution


__all__ = ["attach"]
