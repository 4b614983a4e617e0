"""From every rank's blocks of rows to the global Gramian, the same on every rank.

Instance-wise, the ranks own different rows: each layer takes the scheme that was planned for it.
Task-wise, they own estimates of the same rows, which are summed into column shards. Either way each
rank ends with a part of the Gramian, and the parts have to be summed. Only lower triangles count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jddist.autogram.blocks import JacobianBlock, LookupBlock, OuterBlock, add_blocks
from jddist.autogram.blocks.products import add_square, mirror_

from .collectives import Group
from .factors import Products, rounded_up, start_factors
from .features import start_features
from .planning import Plan
from .schemes import BlockShape, Scheme, Step

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
            shape = BlockShape(
                "lookup", rounded_up(len(block)), block.in_features, block.out_features
            )
        else:
            shape = BlockShape("none" if block is None else "dense")
        shapes.append(shape)
        previous = block
    return shapes


def local_gramian(blocks: Blocks, num_rows: int, device: torch.device) -> Tensor:
    """The Gramian [m, m] of one process's rows, in float64."""
    total = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=device)
    add_blocks(total, blocks)
    return mirror_(total)


def sharded_rows_gramian(
    blocks: Blocks,
    plan: Plan,
    group: Group,
    batches: Sequence[int],
    objectives: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """This rank's part of the Gramian [M, M] of all ranks' rows, in its lower triangle, in one of
    the group's ``buffers``.

    Each layer's message is under way while the one before it is computed with.

    Args:
        blocks: This rank's blocks, in parameter order.
        plan: The plan.
        group: The ranks.
        batches: b of each rank.
        objectives: k.
        dtype: The dtype in which rows and factors travel.
        device: The device of the rows.
    """
    counts = [b * objectives for b in batches]
    m = sum(counts)
    total = group.buffers.take(m * m, torch.float64, device).view(m, m).zero_()
    products = Products(group, counts, device)
    pending: Callable[[], None] | None = None
    for step in plan.steps:
        mine = [blocks[i] for i in step.parameters]
        finish: Callable[[], None] | None = None
        if step.scheme is Scheme.FACTORS:
            finish = start_factors(products, mine, step, group, batches, objectives, dtype, device)
        elif step.scheme is Scheme.FEATURES:
            finish = start_features(total, mine, step, group, batches, objectives, dtype)
        elif step.scheme is Scheme.ROWS:
            finish = _start_rows(total, mine, step, group, counts, dtype)
        if pending is not None:
            pending()
        pending = finish
    if pending is not None:
        pending()
    products.add_to(total)
    return total


def summed_rows_gramian(
    blocks: Blocks,
    plan: Plan,
    row_scale: Tensor,
    group: Group,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """This rank's part of the Gramian [m, m] of the rows summed over ranks, in its lower triangle.

    Also whether each of this rank's own rows is finite: [m].

    Args:
        blocks: This rank's estimate of the rows, in parameter order.
        plan: The plan.
        row_scale: [m], by which this rank's rows are multiplied; a zero drops the row altogether.
        group: The ranks.
        dtype: The dtype in which rows travel.
        device: The device of the rows.
    """
    m = len(row_scale)
    total = torch.zeros(m, m, dtype=torch.float64, device=device)
    finite = torch.ones(m, dtype=torch.bool, device=device)
    for step in plan.steps:
        pieces = _rows([blocks[i] for i in step.parameters], step, m, dtype, device)
        rows = torch.cat([piece.to(dtype) for piece in pieces], dim=1)
        finite &= torch.isfinite(rows.sum(dim=1))
        add_square(total, group.reduce_columns(scale_rows(rows, row_scale)))
    return total, finite


def scale_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """``rows`` [m, ...] times ``scale`` [m]; a zero gives a zero row whatever stood there."""
    factor = scale.to(rows.dtype).view(-1, *[1] * (rows.ndim - 1))
    return torch.where(factor == 0, torch.zeros_like(rows), rows * factor)


def _start_rows(
    total: Tensor,
    mine: Blocks,
    step: Step,
    group: Group,
    counts: Sequence[int],
    dtype: torch.dtype,
) -> Callable[[], None]:
    rows = _rows(mine, step, counts[group.rank], dtype, total.device)
    wait = group.start_rows_to_columns(rows, counts, dtype)

    def finish() -> None:
        columns = wait()
        add_square(total, columns)
        if group.size > 1:
            group.buffers.give_back(columns)

    return finish


def _rows(
    blocks: Blocks, step: Step, num_rows: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """The rows of all the blocks of a step, which belong side by side: [m, p_i]."""
    pieces = []
    for block, width in zip(blocks, step.widths, strict=True):
        if block is None:
            pieces.append(torch.zeros(num_rows, width, dtype=dtype, device=device))
        else:
            assert block.num_rows == num_rows
            pieces.append(block.rows())
    return pieces
