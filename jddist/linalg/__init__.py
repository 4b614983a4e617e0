"""Linear algebra of Jacobian descent: Gramians and the projection onto dual cones."""

from __future__ import annotations

from .batched_projector import AutomaticProjector, BatchedProjector
from .dual_cone import DualConeProjector, QuadprogProjector
from .matrix import Matrix, PSDMatrix, PSDTensor

__all__ = [
    "AutomaticProjector",
    "BatchedProjector",
    "DualConeProjector",
    "Matrix",
    "PSDMatrix",
    "PSDTensor",
    "QuadprogProjector",
]
