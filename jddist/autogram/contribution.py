"""What a rank brings to a call of the engine: its rows, and what it tells the other ranks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement

from jddist.distribution.base import Distribution, is_sharded
from jddist.distribution.counts import Count, checked_count
from jddist.distribution.fully_shard import FullyShard
from jddist.distribution.lockstep import check_plain
from jddist.distribution.planning import Prefer

from . import global_pass
from .accumulation import Joined, stack_blocks
from .book_keeping import Books, no_hooks
from .early import EarlyGramian
from .joint import JointOutput
from .layout import OutputLayout
from .local_pass import Blocks, LocalPass
from .own_gradients import OwnGradients
from .parameters import ParameterTable


@dataclass(eq=False)
class Contribution:
    """What a rank brings to a call.

    Attributes:
        layout: The layout of its objectives; None if it failed before it knew.
        dtype: Their dtype.
        blocks: Its blocks of rows.
        agree: What has to be the same on every rank.
        info: What the other ranks need to know.
        books: How its weighted gradient could be had.
        early: What was counted of its Gramian already, in one process.
    """

    layout: OutputLayout | None = None
    dtype: torch.dtype = torch.float32
    blocks: Blocks = field(default_factory=list)
    agree: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    books: Books = Books.NO
    early: EarlyGramian | None = None


@dataclass(frozen=True, eq=False)
class Contributor:
    """Finds this rank's contribution; whatever it raises is to be told to the other ranks.

    Attributes:
        table: The engine's parameters.
        scope: Its modules.
        local_pass: What computes blocks.
        distribution: How the parameters are distributed.
        placement: Where the objectives live.
        batch_dim: The dimension of the samples, or None.
        prefer: How exchanges are chosen.
        sees_wrappers: Whether the distribution knows of all wrappers.
        own: Notes of what this rank gave to the reduction of gradients.
    """

    table: ParameterTable
    scope: Collection[nn.Module]
    local_pass: LocalPass
    distribution: Distribution
    placement: Placement
    batch_dim: int | None
    prefer: Prefer
    sees_wrappers: bool
    own: OwnGradients = field(default_factory=OwnGradients)

    @property
    def by_passes(self) -> bool:
        """Whether rows come reduced, from one backward of all ranks for each objective."""
        return isinstance(self.distribution, FullyShard) and not is_sharded(self.placement)

    def spread(self) -> tuple[int, dict[int, list[str]]] | None:
        """From which ranks NaN spread by the reduction of gradients, and with which parameters.

        A message of all ranks, which have to have found NaN or infinity before.

        Returns:
            The first such step, and by rank the parameters; None if every rank's own were finite.
        """
        told = self.distribution.handshake("the error", {}, {"own": self.own.found()})
        found = {rank: info["own"] for rank, info in enumerate(told) if info["own"] is not None}
        if not found:
            return None
        first = min(step for step, _ in found.values())
        return first, {rank: names for rank, (step, names) in found.items() if step == first}

    def of_output(
        self,
        output: Tensor,
        count: Count | None,
        weights: Tensor | None,
        step: bool,
        retain_graph: bool,
        reusable: bool,
    ) -> Contribution:
        """What this rank finds for its part of one output."""
        layout = self.layout_of(output)
        counts = self.rows_of_count(count, layout)
        local = self._described(layout, [output], [layout], counts is not None)
        if weights is not None:
            local.agree["shape of the weights"] = list(weights.shape)
        elif self.by_passes:
            self._prepare_passes(local, [output])
            # Columns of the global rows, weighed, are this rank's part of the gradient; in lockstep
            # a rank has only those for which it answers.
            alone = not self.distribution.lockstep.active
            known = self.local_pass.accounted and no_hooks(self.table.trainable, self.scope)
            if step and alone and known:
                local.books = Books.ROWS
        else:
            trainable = self.table.trainable
            taken = step and self.sees_wrappers
            taken = taken and self.distribution.takes_gradients({e.parameter for e in trainable})
            local.agree["whether gradients are handed over"] = taken
            taken = taken and no_hooks(trainable, self.scope)
            free = taken and not retain_graph and counts is None
            keep = taken and retain_graph and counts is None
            alone = self.distribution.everyone.size == 1
            if alone and not reusable:
                scratch = self.local_pass.scratch
                local.early = EarlyGramian(layout.num_rows, output.device, scratch)
            traced = self.distribution.traced(output)
            local.blocks = self.local_pass.blocks(
                traced, layout, keep=keep, free=free, early=local.early
            )
            if taken and self.local_pass.accounted:
                rows = self.local_pass.freed or keep
                local.books = Books.ROWS if rows else Books.GRADIENTS
        local.info = global_pass.to_tell(local.blocks, layout, counts, self.local_pass.samples)
        local.info["books"] = [int(local.books), int(self.local_pass.freed)]
        return local

    def of_pair(self, joint: JointOutput, counts: tuple[Count, Count] | None) -> Contribution:
        """What this rank finds for two outputs, as one vector of objectives."""
        layout = OutputLayout.of(joint.output, None)
        known: list[float] | None = None if counts is None else []
        for part, count in zip((joint.first, joint.second), counts or (), strict=False):
            known = (known or []) + (self.rows_of_count(count, part) or [])
        parts = (joint.first, joint.second)
        self.distribution.check_gives_rows()
        local = self._described(layout, joint.outputs, parts, counts is not None)
        if self.by_passes:
            self._prepare_passes(local, joint.outputs)
        else:
            blocks = [
                self.local_pass.blocks(output, part)
                for output, part in zip(joint.outputs, parts, strict=True)
            ]
            local.blocks = stack_blocks(blocks, [part.num_rows for part in parts])
        local.info = global_pass.to_tell(local.blocks, layout, known, self.local_pass.samples)
        local.info |= {"books": [int(Books.NO), 0], "both": [part.size for part in parts]}
        return local

    def _prepare_passes(self, local: Contribution, outputs: Sequence[Tensor]) -> None:
        """What the ranks have to know before passes of all of them, which give the rows."""
        assert isinstance(self.distribution, FullyShard)
        self.distribution.check_takes_passes()
        reached = [self.local_pass.reached(output) for output in outputs]
        local.agree["parameters reached"] = reached if len(reached) > 1 else reached[0]
        local.agree["reshard"] = self.distribution.reshard
        local.blocks = [None] * len(self.table.entries)

    def of_joined(self, joined: Joined) -> Contribution:
        """What this rank found for several batches."""
        layout = joined.layout
        local = self._described(layout, [joined.output], [layout], joined.count is not None)
        local.blocks = joined.blocks
        local.info = global_pass.to_tell(joined.blocks, layout, joined.count, joined.samples)
        local.info["books"] = [int(Books.NO), 0]
        return local

    def _described(
        self,
        layout: OutputLayout,
        outputs: Sequence[Tensor],
        layouts: Sequence[OutputLayout],
        has_count: bool,
    ) -> Contribution:
        agree = global_pass.must_agree(self.table, outputs, layouts, self.placement, has_count)
        agree["prefer"] = self.prefer
        return Contribution(layout, outputs[0].dtype, agree=agree)

    def layout_of(self, output: Tensor) -> OutputLayout:
        """The layout of an output that can be differentiated, else ValueError."""
        layout = OutputLayout.of(check_plain(output), self.batch_dim)
        self._check_output(output)
        return layout

    def _check_output(self, output: Tensor) -> None:
        sharded = is_sharded(self.placement)
        if sharded and output.ndim == 0 and self.distribution.group.size > 1:
            raise ValueError(
                "Found a scalar output with objectives=Shard(0); expected a dimension along "
                "which the ranks' objectives are concatenated."
            )
        if not output.requires_grad:
            raise ValueError(
                "Found an output that does not require a gradient; expected objectives with a "
                "graph. A rank without samples passes losses[:0] of any dummy sample."
            )
        self.distribution.check_output(output)

    def rows_of_count(self, count: Count | None, layout: OutputLayout) -> list[float] | None:
        counts = checked_count(count, layout.num_rows, self.placement)
        if counts is None:
            return None
        return layout.rows_of(torch.tensor(counts).view(layout.shape)).tolist()
