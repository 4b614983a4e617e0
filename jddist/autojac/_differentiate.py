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


def vjp_rows(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    retain_graph: bool,
    chunk_size: int | None,
) -> list[Tensor]:
    """The rows that the cotangents give: for each input a tensor [m, *input.shape].

    Args:
        outputs: Tensors with a graph.
        inputs: Tensors on which they may depend; rows of others are zero.
        cotangents: For each output, [m, *output.shape]. By default one row for each element of all
            outputs, that is the identity, of which only a chunk is ever in memory.
        retain_graph: Whether to keep the graph after the last row.
        chunk_size: How many rows to differentiate in parallel by vmap: None for all, 1 for none.

    Returns:
        Tensors that may be changed in place: they share memory neither with each other nor with
        the cotangents.

    Raises:
        RuntimeError: An operation of the graph cannot be differentiated under vmap.
    """
    m = sum(o.numel() for o in outputs) if cotangents is None else len(cotangents[0])
    if not inputs or m == 0:
        return [input.new_zeros(m, *input.shape) for input in inputs]
    size = m if chunk_size is None else chunk_size
    pieces: list[list[Tensor]] = []
    for start in range(0, m, size):
        stop = min(start + size, m)
        retain = retain_graph or stop < m
        if cotangents is None:
            chunk = _identity_chunk(outputs, start, stop)
            # The last pass goes through all outputs, to free the whole graph.
            active = [i for i, c in enumerate(chunk) if c is not None or not retain]
        else:
            chunk = [c[start:stop] for c in cotangents]
            active = list(range(len(outputs)))
        filled = [_or_zeros(chunk[i], outputs[i], stop - start) for i in active]
        pieces.append(_one_chunk([outputs[i] for i in active], inputs, filled, retain))
    if len(pieces) == 1:
        return _unshared(pieces[0], cotangents or ())
    return [torch.cat(column) for column in zip(*pieces, strict=True)]


def _identity_chunk(outputs: Sequence[Tensor], start: int, stop: int) -> list[Tensor | None]:
    """Rows ``start`` to ``stop`` of the identity, for each output; None where they are zero."""
    chunk: list[Tensor | None] = []
    first = 0
    for output in outputs:
        low, high = max(start, first), min(stop, first + output.numel())
        if low >= high:
            chunk.append(None)
        else:
            block = output.new_zeros(stop - start, output.numel())
            block[low - start : high - start, low - first : high - first].fill_diagonal_(1)
            chunk.append(block.view(stop - start, *output.shape))
        first += output.numel()
    return chunk


def _or_zeros(cotangent: Tensor | None, output: Tensor, count: int) -> Tensor:
    return output.new_zeros(count, *output.shape) if cotangent is None else cotangent


def _unshared(results: Sequence[Tensor], borrowed: Sequence[Tensor]) -> list[Tensor]:
    """The results, copied where writing into one would change another or a borrowed tensor.

    Autograd hands out one tensor for several inputs (of a sum, say), the cotangent itself, or one
    expanded from fewer elements.
    """
    taken = {tensor.untyped_storage().data_ptr() for tensor in borrowed}
    own = []
    for result in results:
        expanded = any(
            stride == 0 and size > 1
            for size, stride in zip(result.shape, result.stride(), strict=True)
        )
        if result.numel() and (expanded or result.untyped_storage().data_ptr() in taken):
            result = result.clone(memory_format=torch.contiguous_format)
        taken.add(result.untyped_storage().data_ptr())
        own.append(result)
    return own


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
