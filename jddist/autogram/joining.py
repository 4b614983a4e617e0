"""Several batches as one step: their contributions, and the weighted gradients of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jddist._autocast import without_autocast
from jddist.distribution import stalls
from jddist.distribution.base import is_average
from jddist.distribution.counts import Count
from jddist.distribution.fully_shard import FullyShard
from jddist.distribution.handshake import was_told
from jddist.distribution.meeting import Forwards
from jddist.errors import StalledRankError, UnsupportedModelError

from .accumulation import Accumulation, Joined, MicroBatch
from .agreement import Agreement
from .contribution import Contribution
from .joined_rows import JoinedRows
from .layout import OutputLayout
from .local_pass import Blocks
from .step import Step, Weigher


@dataclass(eq=False)
class Joining:
    """Adds batches to an accumulation, and takes the step of all of them.

    Attributes:
        agreement: Lets the ranks agree.
        step: What comes after that.
    """

    agreement: Agreement
    step: Step
    _current: Accumulation | None = field(default=None, init=False)
    _rows: JoinedRows = field(default_factory=JoinedRows, init=False)
    _forwards: Forwards | None = field(default=None, init=False)

    @property
    def is_open(self) -> bool:
        """Whether batches are to be added."""
        return self._current is not None

    @contextmanager
    def accumulate(self) -> Iterator[Accumulation]:
        """See ``Engine.accumulate``."""
        if self._current is not None:
            raise RuntimeError(
                "Found engine.accumulate() inside of engine.accumulate(); expected one. Give all "
                "batches to the outer one."
            )
        distribution = self.agreement.contributor.distribution
        if distribution.reduces_every_backward and not self._on_shards:
            raise UnsupportedModelError(
                "Found engine.accumulate() with DeepSpeed, or with tensor parallelism in "
                "fully_shard, which reduce after every backward; expected another wrapper. Take "
                "larger batches, or a step per micro-batch."
            )
        accumulation = self._current = Accumulation()
        self._rows = JoinedRows()
        try:
            with self._shared_failures():
                yield accumulation
        except Exception as error:
            self._current, self._rows = None, JoinedRows()
            if self._on_shards:
                raise  # the others know
            try:
                self._finish(accumulation, error)
            except Exception:
                pass  # for the other ranks; here the first error counts
            raise
        finally:
            self._current = None
        self._finish(accumulation, None)

    @contextmanager
    def _shared_failures(self) -> Iterator[None]:
        """On shards, whose forwards are a matter of all ranks: what one raises within, all raise.

        But for what is raised in the middle of a forward: there the others wait in the wrapper's
        messages, and are told by whom they were left when these fail.
        """
        distribution = self.agreement.contributor.distribution
        if not self._on_shards:
            yield
            return
        assert isinstance(distribution, FullyShard)
        stalls.note("")
        self._forwards = forwards = distribution.forwards("a forward within Engine.accumulate")
        try:
            with forwards.met():
                yield
        except Exception as error:
            if was_told(error) or isinstance(error, StalledRankError):
                raise  # on every rank
            if stalls.is_failure(error):
                # What the wrapper waited for in vain, or a collective of the user's own.
                with distribution.everyone.naming():
                    raise
            if forwards.unfinished:
                said = f"{type(error).__name__}: {error}"
                stalls.note(f"{said} (raised in a forward within Engine.accumulate)")
                raise
            try:
                distribution.handshake("Engine.accumulate", {}, {}, error)
            except Exception:
                pass  # for the other ranks; here the first error counts
            raise
        finally:
            self._forwards = None

    def add(
        self,
        output: Tensor,
        weighting: Weigher | Tensor,
        count: Count | None,
        scale: float | Tensor | None,
    ) -> None:
        """Computes the blocks of one batch and keeps them."""
        assert self._current is not None
        if self._on_shards:
            self._add_on_shards(output, weighting, count, scale)
            return
        contributor = self.agreement.contributor
        distribution = contributor.distribution
        with distribution.lockstep.pass_ahead():
            layout = contributor.layout_of(output)
            self.agreement.check_modules()
            with distribution.first_pass():
                blocks = contributor.local_pass.blocks(output, layout)
        counts = contributor.rows_of_count(count, layout)
        batch = MicroBatch(output, layout, blocks, counts, contributor.local_pass.samples)
        self._current.add(batch, weighting, None if scale is None else float(scale))

    def _add_on_shards(
        self,
        output: Tensor,
        weighting: Weigher | Tensor,
        count: Count | None,
        scale: float | Tensor | None,
    ) -> None:
        """Every rank adds a batch at the same time, and all fail if one does."""
        assert self._current is not None
        if self._forwards is not None:
            self._forwards.reset()
        contributor = self.agreement.contributor
        local_pass, call = contributor.local_pass, "a batch of Engine.accumulate"
        layout: OutputLayout | None = None
        blocks: Blocks = []
        counts: list[float] | None = None
        if contributor.by_passes:
            agreed = self.agreement.of_output(call, output, count, step=True, retain_graph=False)
            self._rows.add(agreed, output, is_average(contributor.placement))
            layout, output = agreed.layout.local, output.detach()
        else:
            error: Exception | None = None
            with contributor.distribution.first_pass():
                try:
                    layout = contributor.layout_of(output)
                    self.agreement.check_modules()
                    blocks = local_pass.blocks(output, layout)
                    counts = contributor.rows_of_count(count, layout)
                except Exception as failure:  # raised again on every rank, by the handshake
                    error = failure
            contributor.distribution.handshake(call, {}, {}, error)
        assert layout is not None
        batch = MicroBatch(output, layout, blocks, counts, local_pass.samples)
        self._current.add(batch, weighting, None if scale is None else float(scale))

    def _finish_rows(self, accumulation: Accumulation) -> None:
        """The step of all batches whose rows were reduced as they came."""
        contributor, rows = self.agreement.contributor, self._rows
        distribution, reporter = contributor.distribution, self.step.reporter
        reporter.begins()
        distribution.handshake("Engine.accumulate", {"number of batches": rows.num_batches}, {})
        agreed, output = rows.joined(is_average(contributor.placement))
        gramian = self.step.gramian(output, agreed, accumulation.scale)
        weights = self.step.weights(gramian, accumulation.weighting, accumulation.scale)
        accumulation.weights = weights
        with distribution.last_stage():
            self.step.write_gradients(
                output, agreed.blocks, weights, uncounted=agreed.uncounted, retain_graph=False
            )
        scale, skipped = accumulation.scale, self.step.skip
        reporter.ends(agreed.layout, gramian, weights, skipped=skipped, scale=scale)

    @property
    def _on_shards(self) -> bool:
        """Whether every batch is a matter of all ranks, which gather its parameters together."""
        distribution = self.agreement.contributor.distribution
        return isinstance(distribution, FullyShard) and not distribution.lockstep.active

    @without_autocast()
    def _finish(self, accumulation: Accumulation, error: Exception | None) -> None:
        """The step of all accumulated batches; what failed before fails on every rank."""
        contributor = self.agreement.contributor
        if self._on_shards and self._rows.num_batches:
            self._finish_rows(accumulation)
            return
        joined: Joined | None = None
        reporter = self.step.reporter
        reporter.begins()

        def local() -> Contribution:
            nonlocal joined
            if error is not None:
                raise error
            joined = accumulation.joined(contributor.placement)
            return contributor.of_joined(joined)

        agreed = self.agreement.of("Engine.accumulate", local, passes=False)
        assert joined is not None
        gramian = self.step.gramian(joined.output, agreed, accumulation.scale)
        weights = self.step.weights(gramian, accumulation.weighting, accumulation.scale)
        accumulation.weights = weights
        with contributor.distribution.last_stage():
            if self.step.skip:
                self.step.reduce_accumulated()
            else:
                local_weights = joined.weights_of_batches(self.step.local_weights(weights))
                with self.step.watched():
                    if self._on_shards:
                        for output, of_batch in zip(joined.outputs, local_weights, strict=True):
                            contributor.distribution.weighted_backward(
                                output, of_batch, retain_graph=False
                            )
                    else:
                        torch.autograd.backward(joined.outputs, local_weights)
                entries = contributor.table.trainable
                contributor.distribution.place_gradients([e.parameter for e in entries])
        if not self.step.skip:
            self.step.capture.release_passed()
        scale, skipped = accumulation.scale, self.step.skip
        reporter.ends(agreed.layout, gramian, weights, skipped=skipped, scale=scale)
