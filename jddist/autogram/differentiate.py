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

# Rows differentiated at once when every objective needs a pass of its own.
_CHUNK = 32


def sample_gradients(
    output: Tensor,
    layout: OutputLayout,
    inputs: Sequence[Tensor | GradientEdge],
    *,
    retain_graph: bool = True,
    by_vmap: bool = True,
) -> list[Tensor | None]:
    """Gradients of every objective at ``inputs``, all samples of the batch in one pass.

    With a batch dimension, one pass per objective of a sample: the samples being independent,
    dimension 0 of a batched activation separates them. Without, one pass per element of ``output``.

    Args:
        output: The objectives.
        layout: The layout of ``output``.
        inputs: Where gradients are wanted.
        retain_graph: Whether to keep the graph. Only a single pass can free it.
        by_vmap: Whether several passes may be one. Collectives inside of it would not communicate.

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
    return _vjps(flat, inputs, cotangents, retain_graph=retain_graph, by_vmap=by_vmap)


def row_gradients(
    output: Tensor, layout: OutputLayout, inputs: Sequence[Tensor], *, by_vmap: bool = True
) -> list[Tensor | None]:
    """Gradients of every single element of ``output``: one pass for each row of the Jacobian.

    Args:
        output: The objectives.
        layout: The layout of ``output``.
        inputs: Where gradients are wanted.
        by_vmap: Whether several passes may be one.

    Returns:
        One tensor [m, *input.shape] per input, in the engine's order of rows, or None.
    """
    if not inputs:
        return []
    rows = layout.rows_of(output)
    pieces: list[list[Tensor | None]] = []
    identity = torch.eye(len(rows), dtype=output.dtype, device=output.device)
    for chunk in identity.split(_CHUNK):
        pieces.append(_vjps(rows, inputs, chunk, by_vmap=by_vmap))
    joined: list[Tensor | None] = []
    for column in zip(*pieces, strict=True):
        present = [piece for piece in column if piece is not None]
        joined.append(torch.cat(present) if present else None)
    return joined


def weighted_gradients(
    output: Tensor, cotangent: Tensor, inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """One vector-Jacobian product with the graph kept: one tensor like each input, or None."""
    with paused():
        return list(
            torch.autograd.grad(output, inputs, cotangent, retain_graph=True, allow_unused=True)
        )


def _vjps(
    output: Tensor,
    at: Sequence[Tensor | GradientEdge],
    cotangents: Tensor,
    *,
    retain_graph: bool = True,
    by_vmap: bool = True,
) -> list[Tensor | None]:
    """One vector-Jacobian product for each entry of ``cotangents`` [k, *output.shape]."""
    inputs: Any = at  # torch takes a mixed sequence; its annotation does not say so
    with paused(), warnings.catch_warnings():
        # vmap announces operators that it has to loop over; the result is the same.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        if len(cotangents) > 1 and by_vmap:
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
