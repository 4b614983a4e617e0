"""The model zoo: every architecture on which jddist's answers are compared with the oracle's."""

from __future__ import annotations

from tests.zoo.awkward import AWKWARD
from tests.zoo.case import Batch, Case
from tests.zoo.graphs import GRAPHS
from tests.zoo.layers import LAYERS
from tests.zoo.sequences import SEQUENCES
from tests.zoo.sharing import SHARING

__all__ = ["BY_NAME", "CASES", "Batch", "Case"]

CASES: list[Case] = [*LAYERS, *SHARING, *GRAPHS, *AWKWARD, *SEQUENCES]
BY_NAME: dict[str, Case] = {case.name: case for case in CASES}

assert len(BY_NAME) == len(CASES), "two cases share a name"
