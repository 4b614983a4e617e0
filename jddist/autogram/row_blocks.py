"""Task-wise rows of sharded parameters: one backward pass of all ranks for each objective.

The wrapper reduces every row and cuts it as the parameters are cut, so a block holds this rank's
columns of the global rows. No rank ever has more of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from jddist.distribution.cut import part_of
from jddist.distribution.row_passes import RowPass
from jddist.distribution.sharded import ShardedColumns

from .blocks import DenseBlock
from .global_pass import GlobalLayout
from .local_pass import Blocks
from .parameters import ParameterTable


def row_blocks(
    distribution: ShardedColumns,
    layout: GlobalLayout,
    output: Tensor,
    table: ParameterTable,
    factor: float,
) -> tuple[GlobalLayout, Blocks]:
    """This rank's columns of all rows, and the layout that says so.

    Args:
        distribution: The ranks; all of them have to call.
        layout: The layout of the objectives.
        output: This rank's estimates of them.
        table: The parameters.
        factor: By what the wrapper's reduction of an estimate is off.
    """
    objectives = layout.local.rows_of(output)
    distribution.check_same_objectives([objectives])
    parameters = [entry.parameter for entry in table.trainable]
    identity = torch.eye(len(objectives), dtype=output.dtype, device=output.device)
    passes = [
        RowPass([objectives], [start], scale * factor, parameters)
        for start, scale in zip(identity, layout.backward_scale, strict=True)
    ]
    rows, finite = distribution.rows(passes, retain_graph=True)
    blocks: Blocks = [None] * len(table.entries)
    for entry in table.trainable:
        if entry.parameter in rows and distribution.lockstep.counts(entry.parameter):
            local = part_of(rows[entry.parameter])
            blocks[entry.index] = DenseBlock(local.reshape(len(passes), local.shape[1:].numel()))
    return replace(layout, rows_finite=tuple(finite)), blocks
