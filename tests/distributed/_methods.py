"""Every aggregator there is, for the tests on shards: one line for each method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from jddist.aggregation import (
    DBMTL,
    IMTLG,
    MGDA,
    PCD,
    Aggregator,
    AlignedMTL,
    CAGrad,
    ConFIG,
    Constant,
    CRMOGMWeighting,
    DualProj,
    ExcessMTL,
    ExcessMTLWeighting,
    FairGrad,
    GradDrop,
    GradNorm,
    GradVac,
    GramianWeightedAggregator,
    Krum,
    Mean,
    MoCo,
    NashMTL,
    PCGrad,
    Random,
    RandomWeighting,
    Sum,
    TrimmedMean,
    UPGrad,
    UPGradWeighting,
    WeightedAggregator,
)
from jddist.aggregation._losses import NeedsLosses

M = 4  # objectives


@dataclass(frozen=True)
class Method:
    """An aggregator and what it may send.

    Attributes:
        make: Makes a new instance for M objectives.
        sized: Makes one for any number of them, where that matters.
        sums: What the shards add up: the Gramian, a number for each objective, or nothing.
        shares: How often rank 0 shares M numbers.
        follows: Whether a state or a random stream follows these.
    """

    make: Callable[[], Aggregator]
    sums: Literal["gramian", "vector", "nothing"] = "gramian"
    shares: int = 1
    follows: bool = False
    sized: Callable[[int], Aggregator] | None = None

    def of(self, m: int) -> Aggregator:
        """A new instance for m objectives."""
        return self.make() if self.sized is None else self.sized(m)


def state_losses(aggregator: nn.Module, losses: Tensor) -> None:
    """Tells an aggregator the losses of the next call, if it wants to know."""
    for module in aggregator.modules():
        if isinstance(module, NeedsLosses):
            module.set_losses(losses)
            return  # an aggregator hands them on to its weighting


def _leaks(m: int) -> Tensor:
    return torch.linspace(0.0, 1.0, m)


METHODS: dict[str, Method] = {
    "AlignedMTL": Method(AlignedMTL),
    "CAGrad": Method(lambda: CAGrad(0.5)),
    "ConFIG": Method(ConFIG),
    "FairGrad": Method(lambda: FairGrad(1.0)),
    "IMTLG": Method(IMTLG),
    "Krum": Method(lambda: Krum(0, 2)),
    "NashMTL": Method(lambda: NashMTL(M), follows=True, sized=NashMTL),
    "PCD": Method(PCD, follows=True),
    "CRMOGM(ExcessMTL)": Method(
        lambda: WeightedAggregator(CRMOGMWeighting(ExcessMTLWeighting())), "vector", follows=True
    ),
    "CRMOGM(Random)": Method(
        lambda: WeightedAggregator(CRMOGMWeighting(RandomWeighting())), "nothing", follows=True
    ),
    "CRMOGM(UPGrad)": Method(
        lambda: GramianWeightedAggregator(CRMOGMWeighting(UPGradWeighting())), follows=True
    ),
    "Constant": Method(
        lambda: Constant(torch.arange(float(M))),
        "nothing",
        0,
        sized=lambda m: Constant(torch.arange(float(m))),
    ),
    "DBMTL": Method(DBMTL, "vector", 2),
    "DualProj": Method(DualProj),
    "ExcessMTL": Method(ExcessMTL, "vector", follows=True),
    "ExcessMTL, warm": Method(lambda: ExcessMTL(0.1, 1), "vector", follows=True),
    "GradDrop": Method(GradDrop, "nothing", 0),
    "GradDrop, leaking": Method(
        lambda: GradDrop(leak=_leaks(M)), "nothing", 0, sized=lambda m: GradDrop(leak=_leaks(m))
    ),
    "GradNorm": Method(GradNorm, follows=True),
    "GradVac": Method(GradVac, follows=True),
    "MGDA": Method(MGDA),
    "Mean": Method(Mean, "nothing", 0),
    "MoCo": Method(MoCo, follows=True),
    "PCGrad": Method(PCGrad, follows=True),
    "Random": Method(Random, "nothing", follows=True),
    "Random of Gramians": Method(
        lambda: GramianWeightedAggregator(RandomWeighting()), follows=True
    ),
    "Sum": Method(Sum, "nothing", 0),
    "TrimmedMean": Method(lambda: TrimmedMean(1), "nothing", 0),
    "UPGrad": Method(UPGrad),
}
