"""Task-wise rows of sharded parameters: one backward pass of all ranks for each objective.

The wrapper reduces every row and cuts it as the parameters are cut, so a block holds this rank's
columns of the global rows. No rank ever has more of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from jddist.distribution.base import accumulate
from jddist.distribution.cut import like, part_of
from jddist.distribution.row_passes import RowPass
from jddist.distribution.sharded import ShardedColumns

from .blocks import DenseBlock
from .global_pass import GlobalLayout
from .local_pass import Blocks
from .own_gradients import Note
from .parameters import Entry, ParameterTable


def row_blocks(
    distribution: ShardedColumns,
    layout: GlobalLayout,
    objectives: Sequence[Tensor],
    table: ParameterTable,
    factor: float,
    *,
    retain_graph: bool,
) -> tuple[GlobalLayout, Blocks, Blocks]:
    """This rank's columns of all rows, with the layout that says so.

    Of what all ranks hold alike, one of them counts the columns; the others' blocks come apart.

    Args:
        distribution: The ranks; all of them have to call.
        layout: The layout of the objectives.
        objectives: This rank's estimates of them: vectors, each with its graph, in the order of the
            rows.
        table: The parameters.
        factor: By what the wrapper's reduction of an estimate is off.
        retain_graph: Whether to keep the graph after the last row.
    """
    distribution.check_same_objectives(objectives)
    parameters = [entry.parameter for entry in table.trainable]
    starts = [
        (vector, start)
        for vector in objectives
        for start in torch.eye(len(vector), dtype=vector.dtype, device=vector.device)
    ]
    passes = [
        RowPass([vector], [start], scale * factor, parameters)
        for (vector, start), scale in zip(starts, layout.backward_scale, strict=True)
    ]
    rows, finite = distribution.rows(passes, retain_graph=retain_graph)
    blocks: Blocks = [None] * len(table.entries)
    uncounted: Blocks = [None] * len(table.entries)
    for entry in table.trainable:
        if entry.parameter in rows and distribution.lockstep.counts(entry.parameter):
            local = part_of(rows[entry.parameter])
            counts = distribution.is_own(entry.parameter) or distribution.columns.group.rank == 0
            block = DenseBlock(local.reshape(len(passes), local.shape[1:].numel()))
            (blocks if counts else uncounted)[entry.index] = block
    return replace(layout, rows_finite=tuple(finite)), blocks, uncounted


def write_columns(
    blocks: Blocks, uncounted: Blocks, entries: Sequence[Entry], weights: Tensor, note: Note
) -> None:
    """Adds this rank's part of the weighted gradient to ``.grad``, as the wrapper's backward would.

    Args:
        blocks: This rank's columns of all rows.
        uncounted: The same, of what another rank counts.
        entries: The parameters.
        weights: One for each row.
        note: Takes name and gradient of each.
    """
    with torch.no_grad():
        for entry in entries:
            block, parameter = blocks[entry.index], entry.parameter
            if block is None:
                block = uncounted[entry.index]
            if block is not None:
                local = part_of(parameter)
                gradient = block.combine(weights).view(local.shape).to(local.dtype)
                note(entry.name, gradient)
                accumulate(parameter, like(parameter, gradient))
