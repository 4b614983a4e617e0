"""The later stages of a call: the Gramian of all ranks, its weights, and gradients in ``.grad``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from jddist._progress import enter
from jddist.aggregation import Flattening, GeneralizedWeighting, Weighting
from jddist.aggregation._losses import stated_losses
from jddist.aggregation._weightings import check_takes_gramians
from jddist.distribution.exchange import describe
from jddist.distribution.once import Job
from jddist.distribution.planning import Plan

from . import global_pass
from .agreement import Agreed
from .book_keeping import Books, combined, differentiated
from .capture import Capture, paused
from .contribution import Contributor
from .explanation import Taken
from .local_pass import Blocks
from .own_gradients import Noting
from .reporting import Reporter
from .row_blocks import write_columns

Weigher = Callable[[Tensor], Tensor]
Backward = Callable[[Tensor, Tensor], None]


def stated(weighting: Weigher) -> list[list[float]]:
    """The losses that the weighting was told: they have to be the global ones on every rank."""
    return stated_losses(weighting) if isinstance(weighting, nn.Module) else []


@dataclass(eq=False)
class Step:
    """What the last Gramian leaves for the weights and gradients that belong to it.

    Attributes:
        contributor: What found this rank's contribution.
        capture: The engine's hooks.
        nonfinite: What to do about objectives that are not finite.
        tile: Elements of a tile of rows.
        reporter: What tells those who watch.
        agreed: What the ranks agreed on, without blocks; None before the first Gramian.
        taken: What ``explain`` tells of it.
        skip: Whether the weights are zero because an objective was not finite.
    """

    contributor: Contributor
    capture: Capture
    nonfinite: Literal["raise", "skip"]
    tile: int
    reporter: Reporter
    agreed: Agreed | None = None
    taken: Taken | None = None
    skip: bool = False

    def gramian(
        self, output: Tensor, agreed: Agreed, scale: float | Tensor | None = None
    ) -> Tensor:
        """The generalized Gramian of all ranks' objectives, divided by ``scale`` squared."""
        layout, table = agreed.layout, self.contributor.table
        prefer = self.contributor.prefer
        parts = self.reporter.gramian(
            layout, agreed.blocks, output, table, prefer, scale, agreed.early
        )
        self.agreed, self.skip = agreed.without_blocks(), False
        self.taken = self._taken(agreed, parts.plan)
        if not parts.finite and scale is None:
            error = global_pass.nonfinite_error(layout, parts, self.contributor.spread())
            if self.nonfinite == "raise":
                raise error
            warnings.warn(f"{error} The weights of this step are zero.", stacklevel=3)
            self.skip = True
        values = parts.values if scale is None else parts.values / float(scale) ** 2
        if scale is not None and not parts.finite:
            values = torch.full_like(values, torch.nan)
        return layout.whole.generalized(values.to(torch.promote_types(output.dtype, torch.float32)))

    def weights(
        self, gramian: Tensor, weighting: Weigher, scale: float | Tensor | None = None
    ) -> Tensor:
        """The weights from one run on rank 0; NaN where a GradScaler's objectives overflow."""
        if scale is not None and bool(gramian.isnan().any()):
            return gramian.new_full(gramian.shape[: gramian.ndim // 2], torch.nan)
        check_takes_gramians(weighting)
        plain = isinstance(weighting, Weighting) and not isinstance(weighting, GeneralizedWeighting)
        if plain and gramian.ndim != 2:
            raise ValueError(
                f"Found {type(weighting).__name__} on a generalized Gramian of shape "
                f"{tuple(gramian.shape)}; expected a matrix or a GeneralizedWeighting. Use "
                f"{Flattening.__name__}({type(weighting).__name__}(...))."
            )
        shape = gramian.shape[: gramian.ndim // 2]
        if self.skip or gramian.numel() == 0:
            return gramian.new_zeros(shape)
        observers = self.reporter.observers
        observers.weighs([weighting])
        (weights,) = self.contributor.distribution.run_once([Job(weighting, gramian, shape)])
        observers.weighed([weighting])
        return weights

    def local_weights(self, weights: Tensor) -> Tensor:
        """This rank's part of the global weights, times the wrapper's factor."""
        if self.agreed is None:
            raise RuntimeError(
                "Found no Gramian to which the weights could belong; expected a call of "
                "compute_gramian (or backward) first."
            )
        enter("backward")
        factor = self.contributor.distribution.backward_factor(self.contributor.placement)
        local = self.agreed.layout.local_part(weights.detach())
        return (local * factor).to(self.agreed.dtype)

    def write_gradients(
        self,
        output: Tensor,
        blocks: Blocks,
        weights: Tensor,
        *,
        uncounted: Blocks,
        retain_graph: bool,
        backward: Backward | None = None,
    ) -> None:
        """Adds the weighted gradient to ``.grad``, as the wrapper's own backward would.

        Args:
            output: This rank's objectives.
            blocks: Its blocks of rows, from which the gradient comes if that was agreed on.
            weights: Weights of all objectives.
            uncounted: Blocks of columns that another rank counts.
            retain_graph: Whether to keep the graph.
            backward: See ``Engine.backward``.
        """
        if self.skip:
            self.reduce_accumulated()
            return
        local = self.local_weights(weights)
        agreed, entries = self.agreed, self.contributor.table.trainable
        assert agreed is not None
        distribution, own = self.contributor.distribution, self.contributor.own
        # The records live as long as the graph's own tensors.
        kept = paused() if retain_graph else nullcontext()
        if backward is not None:
            with self.watched():
                backward(output, local)
            distribution.check_reduced()
        elif agreed.layout.rows_finite is not None and agreed.books is Books.ROWS:
            # The rows are the global ones, of which this rank has the columns of its gradients.
            of_rows = agreed.layout.whole.rows_of(weights.detach())
            write_columns(blocks, uncounted, entries, of_rows, own.begin())
        elif agreed.books is Books.NO or weights.numel() == 0:
            distribution.check_takes_backward()
            with kept, self.watched():
                distribution.weighted_backward(output, local, retain_graph=retain_graph)
            distribution.check_reduced()
            distribution.place_gradients([e.parameter for e in entries])
        else:
            gradients: Sequence[Tensor | None]
            if agreed.books is Books.ROWS:
                gradients = combined(agreed.layout, blocks, entries, local)
            else:
                with kept:
                    gradients = differentiated(
                        distribution, output, entries, local, retain_graph=retain_graph
                    )
            if distribution.everyone.size > 1:
                gradients = Noting(gradients, [e.name for e in entries], own.begin())
            present = [agreed.layout.has_rows(e.index) for e in entries]
            distribution.write_gradients([e.parameter for e in entries], gradients, present)
        if not retain_graph:
            self.capture.release_passed()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a backward is noted whose gradients other ranks are going to see."""
        self.watch()
        try:
            yield
        finally:
            self.contributor.own.release()

    def watch(self) -> None:
        """Notes the backward that follows, until the next call."""
        distribution = self.contributor.distribution
        if distribution.everyone.size == 1:
            return
        leaves = distribution.leaves()
        self.contributor.own.watch(
            {e.name: leaves.get(e.parameter, e.parameter) for e in self.contributor.table.trainable}
        )

    def reduce_accumulated(self) -> None:
        """Micro-steps under no_sync rely on the reduction of a step that is skipped."""
        entries = self.contributor.table.trainable
        self.contributor.distribution.reduce_accumulated([e.parameter for e in entries])

    def _taken(self, agreed: Agreed, plan: Plan | None) -> Taken:
        local = agreed.layout.local
        return Taken(
            tuple(describe(agreed.blocks, factors=True)),
            local.batch,
            local.objectives,
            self.contributor.local_pass.direct,
            self.contributor.distribution.group.rank,
            plan,
            torch.promote_types(agreed.dtype, torch.float32).itemsize,
            self.tile,
            tuple(
                self.contributor.distribution.lockstep.numel(entry.parameter)
                for entry in self.contributor.table.entries
            ),
        )
