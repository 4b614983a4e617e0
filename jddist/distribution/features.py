"""The scheme FEATURES: Grams of the factors from shards of their features, for t = 1.

With one position, G = (A A^T + 1 if bias) * (D D^T). Both Grams are sums over features, so each
rank squares its share of the features of all samples, and a reduce-scatter adds the squares up and
leaves each rank a part of the pairs of samples to multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jddist.autogram.blocks import JacobianBlock, OuterBlock
from jddist.autogram.blocks.products import add_square, mirror_

from .collectives import Group, column_bounds
from .schemes import Step


def start_features(
    total: Tensor,
    mine: Sequence[JacobianBlock | None],
    step: Step,
    group: Group,
    batches: Sequence[int],
    k: int,
    dtype: torch.dtype,
) -> Callable[[], None]:
    """Sends each rank its share of the features; what follows is added to
    ``total`` [M, M], of which the lower triangle counts. For the rest see ``start_factors``."""
    block, b = mine[0], batches[group.rank]
    if isinstance(block, OuterBlock):
        inputs, grads = block.factors()
        assert inputs is not None
        a, g = inputs[:, 0].to(dtype), grads[:, :, 0].to(dtype)
    else:
        a = torch.zeros(b, step.in_features, dtype=dtype, device=total.device)
        g = torch.zeros(b, k, step.out_features, dtype=dtype, device=total.device)
    in_bounds, out_bounds = (
        column_bounds(n, group.size) for n in (step.in_features, step.out_features)
    )
    sent = [
        torch.cat([a[:, i:j].reshape(-1), g[..., p:q].reshape(-1)])
        for (i, j), (p, q) in zip(in_bounds, out_bounds, strict=True)
    ]
    in_mine, out_mine = (
        stop - start for start, stop in (in_bounds[group.rank], out_bounds[group.rank])
    )
    lengths = [n * (in_mine + k * out_mine) for n in batches]
    wait = group.exchange(sent, lengths)

    def finish() -> None:
        received = wait().split(lengths)
        split = [n * in_mine for n in batches]
        left = torch.cat([flat[:n] for flat, n in zip(received, split, strict=True)])
        right = torch.cat([flat[n:] for flat, n in zip(received, split, strict=True)])
        samples = sum(batches)
        first, second = torch.tril_indices(samples, samples, device=total.device)
        inputs = _square(left.view(samples, in_mine))
        grads = _square(right.view(samples * k, out_mine)).view(samples, k, samples, k)
        count = len(first)
        chunk = -(-count // group.size)
        packed = left.new_zeros(group.size * chunk, 1 + k * k)
        packed[:count, 0] = inputs[first, second]
        packed[:count, 1:] = grads[first, :, second].reshape(count, k * k)
        summed = group.reduce_scatter(packed.view(group.size, chunk, 1 + k * k)).double()
        part = slice(group.rank * chunk, min(count, (group.rank + 1) * chunk))
        first, second = first[part], second[part]
        summed = summed[: len(first)]
        products = (summed[:, :1] + float(step.ones)) * summed[:, 1:]
        total.view(samples, k, samples, k)[first, :, second] += products.view(-1, k, k)

    return finish


def _square(rows: Tensor) -> Tensor:
    total = rows.new_zeros(len(rows), len(rows))
    add_square(total, rows)
    return mirror_(total)
