"""The Gramian taken apart: what each layer contributes to it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from jddist.distribution.base import Distribution
from jddist.distribution.planning import Prefer
from jddist.distribution.schemes import BlockShape

from . import global_pass
from .global_pass import GlobalLayout, GramianParts
from .local_pass import Blocks
from .parameters import ParameterTable


def of_parameters(
    layout: GlobalLayout, blocks: Blocks, indices: Collection[int]
) -> tuple[GlobalLayout, Blocks]:
    """The layout and blocks of some parameters alone."""
    shapes = tuple(
        tuple(s if i in indices else BlockShape("none") for i, s in enumerate(of_rank))
        for of_rank in layout.shapes
    )
    kept: Blocks = [block if i in indices else None for i, block in enumerate(blocks)]
    return replace(layout, shapes=shapes), kept


def gramian_by_layer(
    distribution: Distribution,
    layout: GlobalLayout,
    blocks: Blocks,
    output: Tensor,
    table: ParameterTable,
    prefer: Prefer,
) -> tuple[GramianParts, list[tuple[str, Tensor]]]:
    """``global_pass.gramian`` as the sum of what each module's own parameters contribute.

    A parameter that several modules share counts with the first of them. On several ranks each
    layer's Gramian is summed by itself: m² numbers for each layer are sent, instead of once.

    Returns:
        The whole Gramian, and the names of the modules with their parts, in the engine's order of
        rows; modules without rows are left out.
    """
    layers: list[tuple[str, GramianParts]] = []
    counted = set[int]()
    for owner in table.owners:
        own = {table.index_of[p] for p in owner.paths.values() if p.requires_grad} - counted
        counted |= own
        # Of columns that a wrapper has reduced, the ranks have not told each other.
        if own and (layout.rows_finite is not None or any(layout.has_rows(i) for i in own)):
            some, kept = of_parameters(layout, blocks, own)
            part = global_pass.gramian(distribution, some, kept, output, table, prefer)
            layers.append((owner.name or type(owner.module).__name__, part))
    if not layers:
        return global_pass.gramian(distribution, layout, blocks, output, table, prefer), []
    values = torch.stack([part.values for _, part in layers]).sum(dim=0)
    flags = torch.stack([part.flags for _, part in layers]).any(dim=0)
    exchange = global_pass.plan_of(distribution, layout, output, table, prefer)
    whole = GramianParts(values, flags, exchange)
    return whole, [(name, part.values) for name, part in layers]
