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
from .global_pass import GlobalLayout, GramianParts
from .local_pass import Blocks
from .parameters import ParameterTable


class Reporter:
    """Puts together what the observers of an engine get to see; without any it does nothing.

    Args:
        observers: Those of the engine.
        distribution: The ranks.
        placement: Where the objectives live.
    """

    def __init__(
        self, observers: Observers, distribution: Distribution, placement: Placement
    ) -> None:
        self._observers = observers
        self._distribution = distribution
        self._per_sample = is_sharded(placement)
        self._layers: list[tuple[str, Tensor]] = []
        self._wants_layers = False

    def begins(self) -> None:
        """A step begins."""
        self._layers = []
        self._observers.begins()

    def to_agree(self) -> dict[str, Any]:
        """What has to be the same on every rank: whether layers are exchanged by themselves."""
        self._wants_layers = bool(self._observers) and self._observers.wants_layers()
        return {"Gramians by layer": True} if self._wants_layers else {}

    def gramian(
        self,
        layout: GlobalLayout,
        blocks: Blocks,
        output: Tensor,
        table: ParameterTable,
        prefer: Prefer,
        scale: float | Tensor | None,
    ) -> GramianParts:
        """The global Gramian; also layer by layer if an observer wants it."""
        arguments = (self._distribution, layout, blocks, output, table, prefer)
        if self._wants_layers:
            parts, layers = gramian_by_layer(*arguments)
            factor = 1.0 if scale is None else float(scale) ** -2
            self._layers = [(name, layout.whole.generalized(g * factor)) for name, g in layers]
        else:
            parts, self._layers = global_pass.gramian(*arguments), []
        self._observers.gramian_known()
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
        if not self._observers:
            return
        outcome: Outcome = "skipped" if skipped else "weighed"
        if scale is not None and not skipped and bool(weights.isnan().any()):
            outcome = "overflowed"
        weights = weights.detach()
        self._observers.ends(
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
