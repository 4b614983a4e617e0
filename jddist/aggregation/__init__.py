"""Aggregators of Jacobians [m, n] and weightings of Gramians [m, m], one file per method."""

from __future__ import annotations

from ._bases import Aggregator, GramianWeightedAggregator, WeightedAggregator
from ._constant import Constant, ConstantWeighting
from ._dualproj import DualProj, DualProjWeighting
from ._gradvac import GradVac, GradVacWeighting
from ._mean import Mean, MeanWeighting
from ._mgda import MGDA, MGDAWeighting
from ._pcgrad import PCGrad, PCGradWeighting
from ._random import Random, RandomWeighting
from ._sum import Sum, SumWeighting
from ._upgrad import UPGrad, UPGradWeighting
from ._weightings import Flattening, GeneralizedWeighting, RowCountWeighting, Weighting

__all__ = [
    "MGDA",
    "Aggregator",
    "Constant",
    "ConstantWeighting",
    "DualProj",
    "DualProjWeighting",
    "Flattening",
    "GeneralizedWeighting",
    "GradVac",
    "GradVacWeighting",
    "GramianWeightedAggregator",
    "MGDAWeighting",
    "Mean",
    "MeanWeighting",
    "PCGrad",
    "PCGradWeighting",
    "Random",
    "RandomWeighting",
    "RowCountWeighting",
    "Sum",
    "SumWeighting",
    "UPGrad",
    "UPGradWeighting",
    "WeightedAggregator",
    "Weighting",
]
