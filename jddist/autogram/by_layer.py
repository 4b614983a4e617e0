"""The Gramian taken apart: what each layer contributes to it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from torch import Tensor

from jddist.distribution.base import Distribution
from jddist.distribution.planning import Prefer
from jddist.distribution.schemes import BlockShape

from . import global_pass
from .global_pass import GlobalLayout
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


def gramians_by_layer(
    distribution: Distribution,
    layout: GlobalLayout,
    blocks: Blocks,
    output: Tensor,
    table: ParameterTable,
    prefer: Prefer,
) -> Iterator[tuple[str, Tensor]]:
    """The Gramian with respect to each module's own parameters; their sum is the whole one.

    A parameter that several modules share counts with the first of them. On several ranks each
    layer is exchanged anew, and its Gramian summed: what the exchange of a whole step sends, and m²
    numbers for each layer.

    Yields:
        Names of the modules with their Gramians, in the output's generalized shape.
    """
    counted = set[int]()
    for owner in table.owners:
        own = {table.index_of[p] for p in owner.paths.values() if p.requires_grad} - counted
        counted |= own
        if own and any(layout.has_rows(i) for i in own):
            part, kept = of_parameters(layout, blocks, own)
            parts = global_pass.gramian(distribution, part, kept, output, table, prefer)
            yield owner.name or type(owner.module).__name__, layout.whole.generalized(parts.values)
