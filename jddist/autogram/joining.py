"""Several batches as one step: their contributions, and the weighted gradients of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jddist.distribution.counts import Count
from jddist.errors import UnsupportedModelError

from .accumulation import Accumulation, Joined, MicroBatch
from .agreement import Agreement
from .contribution import Contribution
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
        if self.agreement.contributor.distribution.reduces_every_backward:
            raise UnsupportedModelError(
                "Found engine.accumulate() with fully_shard or DeepSpeed, which reduce after every "
                "backward; expected another wrapper. Take larger batches, or a step per "
                "micro-batch."
            )
        accumulation = self._current = Accumulation()
        try:
            yield accumulation
        except Exception as error:
            self._current = None
            try:
                self._finish(accumulation, error)
            except Exception:
                pass  # for the other ranks; here the first error counts
            raise
        finally:
            self._current = None
        self._finish(accumulation, None)

    def add(
        self,
        output: Tensor,
        weighting: Weigher | Tensor,
        count: Count | None,
        scale: float | Tensor | None,
    ) -> None:
        """Computes the blocks of one batch and keeps them."""
        assert self._current is not None
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

    def _finish(self, accumulation: Accumulation, error: Exception | None) -> None:
        """The step of all accumulated batches; what failed before fails on every rank."""
        contributor = self.agreement.contributor
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
                torch.autograd.backward(joined.outputs, local_weights)
                entries = contributor.table.trainable
                contributor.distribution.place_gradients([e.parameter for e in entries])
        if not self.step.skip:
            self.step.capture.release_passed()
        scale, skipped = accumulation.scale, self.step.skip
        reporter.ends(agreed.layout, gramian, weights, skipped=skipped, scale=scale)
