"""The first two stages of a call, local pass and handshake: what all ranks found, as one layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from jddist.distribution.base import is_average
from jddist.distribution.counts import Count
from jddist.distribution.fully_shard import FullyShard

from .book_keeping import Books, agreed
from .contribution import Contribution, Contributor
from .early import EarlyGramian
from .global_pass import GlobalLayout
from .local_pass import Blocks
from .members import Members
from .refusals import explained
from .reporting import Reporter
from .row_blocks import row_blocks


@dataclass(frozen=True, eq=False)
class Agreed:
    """What follows from all ranks' contributions.

    Attributes:
        layout: How this rank's objectives lie among all.
        blocks: This rank's blocks of rows.
        infos: What the ranks told over which the objectives are spread.
        dtype: The dtype of this rank's objectives.
        books: How this rank gets its weighted gradient.
        early: What was counted of the Gramian already, in one process.
        uncounted: This rank's blocks of columns that another rank counts.
    """

    layout: GlobalLayout
    blocks: Blocks
    infos: list[dict[str, Any]]
    dtype: torch.dtype
    books: Books
    early: EarlyGramian | None = None
    uncounted: Blocks = field(default_factory=list)

    def without_blocks(self) -> Agreed:
        """The same, for those who need no rows."""
        return replace(self, blocks=[], early=None, uncounted=[])


@dataclass(eq=False)
class Agreement:
    """Lets every rank contribute, and fails on every rank if it does on one.

    Attributes:
        members: The engine's modules.
        contributor: What finds this rank's contribution.
        reporter: What tells those who watch.
    """

    members: Members
    contributor: Contributor
    reporter: Reporter
    _warned_uneven: bool = field(default=False, init=False)

    def of_output(
        self,
        call: str,
        output: Tensor,
        count: Count | None,
        *,
        weights: Tensor | None = None,
        step: bool = False,
        retain_graph: bool = True,
        told: Mapping[str, Any] = MappingProxyType({}),
        reusable: bool = False,
    ) -> Agreed:
        """Agrees on one output.

        Args:
            call: The public function under way, which has to be the same on every rank.
            output: This rank's objectives.
            count: See ``Engine.compute_gramian``.
            weights: Weights that are given already: then no rows are needed, and only the layout
                is agreed on.
            step: Whether the weighted gradient is to come from the blocks, if that is possible.
            retain_graph: Whether to keep the graph even so.
            told: What else has to be the same on every rank.
            reusable: Whether the blocks are to be of use for more than one Gramian.
        """

        def local() -> Contribution:
            found = self.contributor.of_output(output, count, weights, step, retain_graph, reusable)
            found.agree.update(told)
            return found

        by_passes = weights is None and self.contributor.by_passes
        found = self.of(call, local, passes=weights is None and not by_passes)
        if not by_passes:
            return found
        retain = retain_graph or found.books is Books.NO
        return self.with_rows(found, [found.layout.local.rows_of(output)], retain_graph=retain)

    def with_rows(
        self, found: Agreed, objectives: Sequence[Tensor], *, retain_graph: bool
    ) -> Agreed:
        """What was agreed on, with rows by one pass of all ranks for each objective.

        Args:
            found: What was agreed on, without rows.
            objectives: This rank's vectors of objectives, each with its graph.
            retain_graph: Whether to keep the graphs.
        """
        distribution, placement = self.contributor.distribution, self.contributor.placement
        assert isinstance(distribution, FullyShard)
        layout, blocks, uncounted = row_blocks(
            distribution,
            found.layout,
            objectives,
            self.contributor.table,
            distribution.backward_factor(placement),
            retain_graph=retain_graph,
        )
        return replace(found, layout=layout, blocks=blocks, uncounted=uncounted)

    def of(self, call: str, find_local: Callable[[], Contribution], *, passes: bool) -> Agreed:
        """Agrees on whatever ``find_local`` finds.

        Args:
            call: The public function under way.
            find_local: Finds this rank's contribution; what it raises reaches every rank.
            passes: Whether it differentiates, and so needs the wrapper's guard.
        """
        distribution, placement = self.contributor.distribution, self.contributor.placement
        self.contributor.own.release()
        error: Exception | None = None
        local = Contribution()
        # Outside of the attempt: every rank has to enter, whatever it runs into inside.
        with distribution.first_pass() if passes else nullcontext():
            try:
                with distribution.lockstep.pass_ahead() if passes else nullcontext():
                    self.check_modules()
                    local = find_local()
            except Exception as failure:  # it is raised again on every rank, by the handshake
                if passes and distribution.lockstep.stopped:  # it was already
                    raise
                error = explained(failure)
        agree = {**local.agree, **self.reporter.to_agree()}
        told = distribution.handshake(call, agree, local.info, error)
        infos = distribution.by_objectives(told)
        assert local.layout is not None
        self._warn_if_uneven(infos)
        books = agreed([info["books"] for info in infos], local.books)
        layout = GlobalLayout.of(local.layout, infos, distribution.group.rank, placement)
        return Agreed(layout, local.blocks, infos, local.dtype, books, local.early)

    def check_modules(self) -> None:
        """Raises if the modules have become unfit for a step."""
        batched = self.contributor.batch_dim is not None
        self.members.check_current(self.contributor.distribution, batched=batched)

    def _warn_if_uneven(self, infos: list[dict[str, Any]]) -> None:
        samples = [info["samples"] for info in infos]
        uneven = is_average(self.contributor.placement) and len(set(samples)) > 1
        if uneven and infos[0]["count"] is None and not self._warned_uneven:
            self._warned_uneven = True
            warnings.warn(
                f"Found different batch sizes on the ranks ({', '.join(map(str, samples))}) and no "
                "count: the global objective is the plain mean over ranks. Pass count= (this "
                "rank's number of samples) for the mean over all samples.",
                stacklevel=5,
            )
