"""Rows of Jacobians: vector-Jacobian products, several at a time.

Always by ``torch.autograd.grad`` towards explicit inputs, so that neither ``.grad`` nor a
data-parallel reducer is touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from jddist.autogram.capture import paused


def check_chunk_size(parallel_chunk_size: int | None) -> None:
    """Raises ValueError unless it is None or a positive number of rows."""
    if parallel_chunk_size is not None and parallel_chunk_size < 1:
        raise ValueError(
            f"Found parallel_chunk_size={parallel_chunk_size}; expected None or a positive number."
        )


def identity_rows(outputs: Sequence[Tensor]) -> list[Tensor]:
    """One row per element of all outputs: for each output the cotangents [m, *output.shape]."""
    total = sum(output.numel() for output in outputs)
    rows, start = [], 0
    for output in outputs:
        count = output.numel()
        block = torch.zeros(total, count, dtype=output.dtype, device=output.device)
        block[start : start + count].fill_diagonal_(1)
        rows.append(block.view(total, *output.shape))
        start += count
    return rows


def vjp_rows(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    retain_graph: bool,
    chunk_size: int | None,
) -> list[Tensor]:
    """The rows that the cotangents give: for each input a tensor [m, *input.shape].

    Args:
        outputs: Tensors with a graph.
        inputs: Tensors on which they may depend; rows of others are zero.
        cotangents: For each output, [m, *output.shape].
        retain_graph: Whether to keep the graph after the last row.
        chunk_size: How many rows to differentiate in parallel by vmap: None for all, 1 for none.

    Raises:
        RuntimeError: An operation of the graph cannot be differentiated under vmap.
    """
    m = len(cotangents[0])
    if not inputs or m == 0:
        return [input.new_zeros(m, *input.shape) for input in inputs]
    size = m if chunk_size is None else chunk_size
    pieces: list[list[Tensor]] = []
    for start in range(0, m, size):
        chunk = [c[start : start + size] for c in cotangents]
        retain = retain_graph or start + size < m
        pieces.append(_one_chunk(outputs, inputs, chunk, retain))
    if len(pieces) == 1:
        return pieces[0]
    return [torch.cat(column) for column in zip(*pieces, strict=True)]


def _one_chunk(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: list[Tensor], retain: bool
) -> list[Tensor]:
    batched = len(cotangents[0]) > 1
    arguments = cotangents if batched else [c.squeeze(0) for c in cotangents]
    with paused(), warnings.catch_warnings():
        # vmap announces operators that it has to loop over; the result is the same.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        try:
            grads = torch.autograd.grad(
                outputs,
                inputs,
                arguments,
                retain_graph=retain,
                allow_unused=True,
                is_grads_batched=batched,
            )
        except RuntimeError as error:
            if not batched or "second time" in str(error):
                raise
            raise RuntimeError(
                f"Differentiating {len(cotangents[0])} rows in parallel failed. If an operation of "
                "the graph does not work under torch.vmap, pass parallel_chunk_size=1, which "
                f"differentiates row by row. ({error})"
            ) from error
    k = len(cotangents[0])
    return [
        input.new_zeros(k, *input.shape) if g is None else (g if batched else g.unsqueeze(0))
        for input, g in zip(inputs, grads, strict=True)
    ]
