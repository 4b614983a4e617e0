"""The first pass: gradients of an output at edges inside the graph, never through AccumulateGrad.

``torch.autograd.grad`` with explicit inputs computes no gradient of a parameter that is not asked
for, and fires neither ``.grad`` accumulation nor a data-parallel reducer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .capture import paused
from .layout import OutputLayout

# Objectives differentiated at once, by one pass under vmap.
_CHUNK = 32
# Up to so many bytes of a layer's output per objective, one pass for many objectives is faster than
# a pass for each: 0.3 to 1.0 of its time on a CPU, where more gets 1.0 to 1.4, beyond its caches
# (`python -m tests.benchmark.passes`). Of an accelerator this is a guess.
_WIDEST_BATCHED = {"cpu": 2 << 20}
_WIDEST_BATCHED_ELSEWHERE = 64 << 20


def objectives_at_once(widest: int, device: torch.device) -> int:
    """How many objectives to differentiate in one pass.

    Args:
        widest: Bytes of the largest gradient inside the graph, for one objective.
        device: Where it is.
    """
    limit = _WIDEST_BATCHED.get(device.type, _WIDEST_BATCHED_ELSEWHERE)
    return 1 if widest > limit else _CHUNK


def sample_gradients(
    output: Tensor,
    layout: OutputLayout,
    inputs: Sequence[Tensor | GradientEdge],
    *,
    chunk: int = _CHUNK,
    retain_graph: bool = True,
) -> list[Tensor | None]:
    """Gradients of every objective at ``inputs``, all samples of the batch in one pass.

    With a batch dimension, one pass per objective of a sample: the samples being independent,
    dimension 0 of a batched activation separates them. Without, one pass per element of ``output``.

    Args:
        output: The objectives.
        layout: The layout of ``output``.
        inputs: Where gradients are wanted.
        chunk: How many objectives of a sample to differentiate in one pass; 1 where the graph
            communicates, since collectives do not do so under vmap.
        retain_graph: Whether to keep the graph. Only a single pass can free it.

    Returns:
        One tensor [k, *input.shape] per input, or None where the output does not depend on it.
    """
    if not inputs:
        return []
    k, b = layout.objectives, layout.batch
    flat = layout.rows_of(output).reshape(b, k)
    cotangents = torch.eye(k, dtype=output.dtype, device=output.device).unsqueeze(1)
    assert retain_graph or k == 1
    cotangents = cotangents.expand(k, b, k)
    if k == 1:
        return _vjps(flat, inputs, cotangents, retain_graph=retain_graph)
    return _in_chunks(flat, inputs, cotangents, chunk)


def row_gradients(
    output: Tensor, layout: OutputLayout, inputs: Sequence[Tensor], *, chunk: int = _CHUNK
) -> list[Tensor | None]:
    """Gradients of every single element of ``output``: one pass for each row of the Jacobian.

    Args:
        output: The objectives.
        layout: The layout of ``output``.
        inputs: Where gradients are wanted.
        chunk: How many rows to differentiate in one pass.

    Returns:
        One tensor [m, *input.shape] per input, in the engine's order of rows, or None.
    """
    if not inputs:
        return []
    rows = layout.rows_of(output)
    identity = torch.eye(len(rows), dtype=output.dtype, device=output.device)
    return _in_chunks(rows, inputs, identity, chunk)


def weighted_gradients(
    output: Tensor, cotangent: Tensor, inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """One vector-Jacobian product with the graph kept: one tensor like each input, or None."""
    with paused():
        return list(
            torch.autograd.grad(output, inputs, cotangent, retain_graph=True, allow_unused=True)
        )


def _in_chunks(
    output: Tensor, at: Sequence[Tensor | GradientEdge], cotangents: Tensor, chunk: int
) -> list[Tensor | None]:
    """``_vjps``, so many at once."""
    joined: list[list[Tensor]] = [[] for _ in at]
    for part in cotangents.split(chunk):
        # One after the other, a pass's results are the only ones that exist twice.
        for pieces, gradient in zip(joined, _vjps(output, at, part), strict=True):
            if gradient is not None:
                pieces.append(gradient)
    return [torch.cat(p) if len(p) > 1 else p[0] if p else None for p in joined]


def _vjps(
    output: Tensor,
    at: Sequence[Tensor | GradientEdge],
    cotangents: Tensor,
    *,
    retain_graph: bool = True,
) -> list[Tensor | None]:
    """One vector-Jacobian product for each entry of ``cotangents`` [k, *output.shape]."""
    inputs: Any = at  # torch takes a mixed sequence; its annotation does not say so
    with paused(), warnings.catch_warnings():
        # vmap announces operators that it has to loop over; the result is the same.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        if len(cotangents) > 1:
            try:
                return list(
                    torch.autograd.grad(
                        output,
                        inputs,
                        cotangents,
                        retain_graph=True,
                        allow_unused=True,
                        is_grads_batched=True,
                    )
                )
            except RuntimeError:
                # No batching rule (a user's autograd.Function, a recomputed dropout): one by one.
                pass
        passes = [
            torch.autograd.grad(output, inputs, c, retain_graph=retain_graph, allow_unused=True)
            for c in cotangents
        ]
    result: list[Tensor | None] = []
    for column in zip(*passes, strict=True):
        present = [g for g in column if g is not None]
        if len(present) == 1 == len(passes):
            result.append(present[0].unsqueeze(0))  # the usual case, without a copy
        else:
            result.append(torch.stack(present) if present else None)
    return result
