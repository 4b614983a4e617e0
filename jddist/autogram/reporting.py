"""What an engine tells those who watch its steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import Placement

from jddist._observing import Observers, Outcome, StepRecord, Weighed
from jddist.distribution.base import Distribution, is_sharded
from jddist.distribution.planning import Prefer

from . import global_pass
from .by_layer import gramian_by_layer
from .early import EarlyGramian
from .global_pass import GlobalLayout, GramianParts
from .local_pass import Blocks
from .parameters import ParameterTable


class Reporter:
    """Puts together what the observers of an engine get to see; without any it does nothing.

    Args:
        observers: Who watches the engine.
        distribution: The ranks.
        placement: Where the objectives live.

    Attributes:
        observers: Who watches the engine.
        wants_layers: Whether the step that began is to have the Gramians by layer, for which the
            blocks have to outlive the whole Gramian.
    """

    def __init__(
        self, observers: Observers, distribution: Distribution, placement: Placement
    ) -> None:
        self.observers = observers
        self._distribution = distribution
        self._per_sample = is_sharded(placement)
        self._layers: list[tuple[str, Tensor]] = []
        self.wants_layers = False

    def begins(self) -> None:
        """A step begins."""
        self._layers = []
        self.observers.begins()
        self.wants_layers = bool(self.observers) and self.observers.wants_layers()

    def to_agree(self) -> dict[str, Any]:
        """What has to be the same on every rank: whether layers are exchanged by themselves."""
        return {"Gramians by layer": True} if self.wants_layers else {}

    def gramian(
        self,
        layout: GlobalLayout,
        blocks: Blocks,
        output: Tensor,
        table: ParameterTable,
        prefer: Prefer,
        scale: float | Tensor | None,
        early: EarlyGramian | None,
    ) -> GramianParts:
        """The global Gramian; also layer by layer if an observer wants it."""
        arguments = (self._distribution, layout, blocks, output, table, prefer)
        if self.wants_layers:
            parts, layers = gramian_by_layer(*arguments)
            factor = 1.0 if scale is None else float(scale) ** -2
            self._layers = [(name, layout.whole.generalized(g * factor)) for name, g in layers]
        else:
            parts, self._layers = global_pass.gramian(*arguments, early), []
        self.observers.gramian_known()
        return parts

    def ends(
        self,
        layout: GlobalLayout,
        gramian: Tensor | None,
        weights: Tensor,
        *,
        skipped: bool,
        scale: float | Tensor | None = None,
    ) -> None:
        """The step is done."""
        layers, self._layers = self._layers, []
        if not self.observers:
            return
        outcome: Outcome = "skipped" if skipped else "weighed"
        if scale is not None and not skipped and bool(weights.isnan().any()):
            outcome = "overflowed"
        weights = weights.detach()
        self.observers.ends(
            StepRecord(
                (Weighed("", gramian, weights),),
                tuple(Weighed(name, part, weights) for name, part in layers),
                layout.whole.sharded_dim,
                self._per_sample if weights.shape == layout.whole.shape else None,
                outcome,
                self._distribution.group.rank,
                self._distribution.group.size,
            )
        )
