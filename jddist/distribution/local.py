"""One process, or ranks that are meant to have nothing to do with each other."""

from __future__ import annotations

from torch.distributed.tensor import Placement

from .base import Distribution
from .collectives import Group


class Local(Distribution):
    """Everything belongs to this process. Say so explicitly when several ranks run."""

    def __init__(self, objectives: Placement | None = None) -> None:
        super().__init__(Group(None), objectives)
