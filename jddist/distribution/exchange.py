"""From every rank's blocks of rows to the global Gramian, the same on every rank.

Instance-wise, the ranks own different rows: the factors or the rows are exchanged, whichever is
fewer bytes. Task-wise, they own estimates of the same rows, which are summed into column shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from jddist.autogram.blocks import JacobianBlock, LookupBlock, OuterBlock
from jddist.autogram.blocks.products import mirror_

from .collectives import Group
from .plan import BlockShape, Scheme, Step

# Columns that travel together: small parameters share a collective.
_BUCKET_ELEMENTS = 1 << 22

Blocks = Sequence[JacobianBlock | None]


def describe(blocks: Blocks, *, factors: bool) -> list[BlockShape]:
    """What this rank tells the others of its blocks.

    Args:
        blocks: This rank's blocks, in parameter order.
        factors: Whether factors may be exchanged; they need the same k on all ranks.
    """
    shapes: list[BlockShape] = []
    previous: JacobianBlock | None = None
    for block in blocks:
        if factors and isinstance(block, OuterBlock):
            shares = isinstance(previous, OuterBlock) and block.shares_grads(previous)
            shape = BlockShape(
                "outer", block.positions, block.in_features, block.out_features, shares
            )
        elif factors and isinstance(block, LookupBlock):
            count = rounded_up(len(block))
            shape = BlockShape("lookup", count, block.in_features, block.out_features)
        else:
            shape = BlockShape("none" if block is None else "dense")
        shapes.append(shape)
        previous = block
    return shapes


def local_gramian(blocks: Blocks, num_rows: int, device: torch.device) -> Tensor:
    """The Gramian [m, m] of one process's rows, in float64."""
    total = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=device)
    index = 0
    while index < len(blocks):
        block, after = blocks[index], blocks[index + 1] if index + 1 < len(blocks) else None
        index += 1
        if block is None:
            continue
        if is_weight_with_bias(block, after):
            assert isinstance(block, OuterBlock)
            if block.prefers_pairs():  # then the bias is nearly free
                block = block.with_bias()
                index += 1
        block.add_gramian(total)
    return mirror_(total)


def is_weight_with_bias(block: JacobianBlock | None, after: JacobianBlock | None) -> bool:
    """Whether two blocks are the weight and the bias of one layer, with the same gradients."""
    return (
        isinstance(block, OuterBlock)
        and isinstance(after, OuterBlock)
        and block.in_features > 0
        and after.in_features == 0
        and after.shares_grads(block)
    )


def sharded_rows_gramian(
    blocks: Blocks,
    steps: Sequence[Step],
    group: Group,
    batches: Sequence[int],
    objectives: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """This rank's part of the Gramian [M, M] of all ranks' rows; the parts have to be summed.

    Args:
        blocks: This rank's blocks, in parameter order.
        steps: The plan.
        group: The ranks.
        batches: b of each rank.
        objectives: k.
        dtype: The dtype in which rows and factors travel.
        device: The device of the rows.
    """
    counts = [b * objectives for b in batches]
    total = torch.zeros(sum(counts), sum(counts), dtype=torch.float64, device=device)
    bucket = _Bucket(
        total, counts[group.rank], dtype, lambda rows: group.rows_to_columns(rows, counts)
    )
    for step in steps:
        mine = [blocks[i] for i in step.parameters]
        if step.scheme is Scheme.FACTORS:
            _exchange_factors(total, mine, step, group, batches, objectives, dtype)
        elif step.scheme is Scheme.ROWS:
            assert len(mine) == 1
            bucket.append(mine[0], step.columns)
    bucket.flush()
    return total


def summed_rows_gramian(
    blocks: Blocks,
    columns: Sequence[int],
    row_scale: Tensor,
    group: Group,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """This rank's part of the Gramian [m, m] of the rows summed over ranks; sum the parts.

    Also whether each of this rank's own rows is finite: [m].

    Args:
        blocks: This rank's estimate of the rows, in parameter order.
        columns: The number of elements of each parameter.
        row_scale: [m], by which this rank's rows are multiplied; a zero drops the row altogether.
        group: The ranks.
        dtype: The dtype in which rows travel.
        device: The device of the rows.
    """
    m = len(row_scale)
    total = torch.zeros(m, m, dtype=torch.float64, device=device)
    bucket = _Bucket(total, m, dtype, group.reduce_columns, row_scale)
    for block, width in zip(blocks, columns, strict=True):
        bucket.append(block, width)
    bucket.flush()
    return total, bucket.finite


class _Bucket:
    """Collects rows until it is worth a collective, then adds their column shard's Gramian."""

    def __init__(
        self,
        total: Tensor,
        num_rows: int,
        dtype: torch.dtype,
        shard: Callable[[Tensor], Tensor],
        row_scale: Tensor | None = None,
    ) -> None:
        self._total = total
        self._num_rows = num_rows
        self._dtype = dtype
        self._shard = shard
        self._row_scale = row_scale
        self.finite = torch.ones(num_rows, dtype=torch.bool, device=total.device)
        self._pieces: list[Tensor] = []
        self._columns = 0

    def append(self, block: JacobianBlock | None, columns: int) -> None:
        if self._columns and (self._columns + columns) * len(self._total) > _BUCKET_ELEMENTS:
            self.flush()
        if block is None:
            rows = torch.zeros(
                self._num_rows, columns, dtype=self._dtype, device=self._total.device
            )
        else:
            assert block.num_rows == self._num_rows
            rows = block.rows().to(self._dtype)
        if self._row_scale is not None:
            self.finite &= torch.isfinite(rows.sum(dim=1))
            rows = scale_rows(rows, self._row_scale)
        self._pieces.append(rows)
        self._columns += columns

    def flush(self) -> None:
        if not self._pieces:
            return
        rows = torch.cat(self._pieces, dim=1)
        self._pieces, self._columns = [], 0
        shard = self._shard(rows)
        self._total += shard @ shard.T


def scale_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """``rows`` [m, ...] times ``scale`` [m]; a zero gives a zero row whatever stood there."""
    factor = scale.to(rows.dtype).view(-1, *[1] * (rows.ndim - 1))
    return torch.where(factor == 0, torch.zeros_like(rows), rows * factor)


def _exchange_factors(
    total: Tensor,
    mine: Sequence[JacobianBlock | None],
    step: Step,
    group: Group,
    batches: Sequence[int],
    k: int,
    dtype: torch.dtype,
) -> None:
    block = mine[0]
    if block is None or step.lengths[group.rank] == 0:
        flat = torch.zeros(step.lengths[group.rank], dtype=dtype, device=total.device)
    else:
        flat = _flatten(block, dtype, step.positions[group.rank])
    gathered = group.all_gather_uneven(flat, step.lengths)
    starts = [k * sum(batches[:r]) for r in range(group.size + 1)]
    own = _rebuild(gathered[group.rank], step, group.rank, batches, k)
    if own is None:
        return
    rows = slice(starts[group.rank], starts[group.rank + 1])
    for other_rank in _partners(group.rank, group.size):
        other = own if other_rank == group.rank else None
        if other is None:
            other = _rebuild(gathered[other_rank], step, other_rank, batches, k)
        if other is None:
            continue
        columns = slice(starts[other_rank], starts[other_rank + 1])
        product = own.cross(other)
        total[rows, columns] += product
        if other_rank != group.rank:
            total[columns, rows] += product.T


def _partners(rank: int, size: int) -> list[int]:
    """The ranks whose blocks with ``rank`` this rank computes: each pair is computed once."""
    partners = [rank, *((rank + d) % size for d in range(1, (size + 1) // 2))]
    if size % 2 == 0 and rank < size // 2:
        partners.append(rank + size // 2)
    return partners


def rounded_up(count: int) -> int:
    """At most an eighth more: the number of entries changes with every batch, and what changes has
    to be told to the other ranks anew."""
    granule = 1 << max(0, count.bit_length() - 4)
    return -(-count // granule) * granule


def _flatten(block: JacobianBlock, dtype: torch.dtype, positions: int) -> Tensor:
    """A block's factors as one vector."""
    if isinstance(block, LookupBlock):
        samples, lines, values = block.entries()
        missing = positions - len(block)  # filled with zeros for line 0
        samples, lines = (F.pad(x, (0, missing)) for x in (samples, lines))
        values = F.pad(values, (0, 0, 0, 0, 0, missing))
        # Whole numbers travel as they are, in the bits of floating-point ones.
        bits = torch.cat([samples, lines]).to(_integers_like(dtype)).view(dtype)
        return torch.cat([bits, values.reshape(-1).to(dtype)])
    assert isinstance(block, OuterBlock)
    inputs, grads = block.factors()
    pieces = [grads.reshape(-1)] if inputs is None else [inputs.reshape(-1), grads.reshape(-1)]
    return torch.cat(pieces).to(dtype)


def _rebuild(
    flat: Tensor, step: Step, rank: int, batches: Sequence[int], k: int
) -> JacobianBlock | None:
    b, t = batches[rank], step.positions[rank]
    if b * t == 0:
        return None
    if step.kind == "lookup":
        samples, lines = flat[: 2 * t].view(_integers_like(flat.dtype)).long().split(t)
        values = flat[2 * t :].view(t, k, step.in_features)
        return LookupBlock(samples, lines, values, b, step.out_features)
    split = b * t * step.in_features
    inputs = flat[:split].view(b, t, step.in_features) if step.in_features else None
    grads = flat[split:].view(b, k, t, step.out_features)
    return OuterBlock(inputs, grads, ones=step.ones)


def _integers_like(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype.itemsize == 8 else torch.int32
