"""One process, or ranks that are meant to have nothing to do with each other."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor
from torch.distributed.tensor import Placement
from torch.nn.parameter import Parameter

from .base import Distribution, accumulate
from .collectives import Group


class Local(Distribution):
    """Everything belongs to this process. Say so explicitly when several ranks run."""

    def __init__(self, objectives: Placement | None = None) -> None:
        super().__init__(Group(None), objectives)

    def takes_gradients(self, parameters: Collection[Parameter]) -> bool:
        return True

    def write_gradients(
        self,
        parameters: Sequence[Parameter],
        gradients: Sequence[Tensor | None],
        present: Sequence[bool],
    ) -> None:
        # All of them before any is written: computing one may fail.
        for parameter, gradient in zip(parameters, list(gradients), strict=True):
            if gradient is not None:
                accumulate(parameter, gradient)
