"""Hugging Face Accelerate: Jacobian descent where a script calls ``accelerator.backward``.

The model is wrapped by ``accelerator.prepare``, and the engine is made from what comes back::

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    engine = Engine(model, batch_dim=0)
    for x, y in loader:
        with accelerator.accumulate(model):
            losses = criterion(model(x), y)  # [b]: one objective per sample
            backward(accelerator, engine, losses, UPGradWeighting())
            optimizer.step()
            optimizer.zero_grad()
"""

from __future__ import annotations

from torch import Tensor

from jddist.autogram import Engine
from jddist.autogram.step import Weigher
from jddist.distribution.counts import Count

from ._extra import require

require("accelerate", "accelerate")

# What is missing is told first; and there are no stubs.
from accelerate import Accelerator, DistributedType  # type: ignore[import-untyped]  # noqa: E402


def backward(
    accelerator: Accelerator,
    engine: Engine,
    losses: Tensor,
    weighting_or_weights: Weigher | Tensor,
    /,
    *,
    count: Count | None = None,
) -> Tensor:
    """A whole step of Jacobian descent, with ``accelerator.backward`` as its backward.

    Accumulation keeps Accelerate's convention: every micro-batch gets weights of its own, and the
    gradients are divided by ``accelerator.gradient_accumulation_steps``, so that ``.grad`` is their
    mean. Under fp16 the weights are those of the unscaled losses, and a step that overflows is
    skipped on every rank by Accelerate's GradScaler. Clip with ``accelerator.clip_grad_norm_``.

    Args:
        accelerator: What prepared the model.
        engine: An Engine on the prepared model.
        losses: This rank's objectives, with their graph, of any shape. Not their mean.
        weighting_or_weights: A weighting (any callable on the Gramian), or the global weights.
        count: With task-wise objectives, the number of samples that these are means over; see
            ``Engine.compute_gramian``.

    Returns:
        The weights of all objectives of all ranks.

    Raises:
        The errors of ``Engine.backward``.
    """
    return divided_backward(accelerator, engine, losses, weighting_or_weights, count, None)


def divided_backward(
    accelerator: Accelerator,
    engine: Engine,
    losses: Tensor,
    weighting_or_weights: Weigher | Tensor,
    count: Count | None,
    divisor: int | None,
) -> Tensor:
    """``backward``; or by a caller's own number of micro-batches, not by Accelerate's."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # A DeepSpeed engine goes back from scalars alone.
        own = {} if divisor is None else {"scale_wrt_gas": False}

        def scalar(_: Tensor, weights: Tensor) -> None:
            accelerator.backward((losses * weights).sum() / (divisor or 1), **own)

        return engine.backward(losses, weighting_or_weights, count=count, backward=scalar)

    def vector(_: Tensor, weights: Tensor) -> None:
        # It scales, and divides by its own number of micro-batches, by itself.
        accelerator.backward(losses, gradient=weights / (divisor or 1))

    scaler = accelerator.scaler
    scaled = scaler is not None and scaler.is_enabled()
    return engine.backward(
        scaler.scale(losses) if scaled else losses,
        weighting_or_weights,
        count=count,
        scale=scaler.get_scale() if scaled else None,
        backward=vector,
    )
