"""Every scalarizer of one shape, as ours and as torchjd's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import jddist.scalarization as ours
from jddist.scalarization import Scalarizer

SHAPES = [(), (1,), (5,), (3, 4), (2, 3, 4)]
STATELESS = ["GeometricMean", "STCH", "STCH-full", "COSMOS", "PBI", "PBI-full"]
LEARNED = ["IMTLL", "UW"]
NAMES = [*STATELESS, *LEARNED, "DWA", "FAMO", "FAMO-full"]
ALL_NAMES = [*NAMES, "Mean", "Sum", "Random", "Constant"]


def values_of(
    shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64, low: float = 0.1
) -> Tensor:
    """Losses between `low` and 3, away from the zeros and bounds where methods break off."""
    generator = torch.Generator().manual_seed(seed)
    drawn = low + (3.0 - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def arguments(
    name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Constructor arguments for values of a shape."""
    weights = values_of(shape, 100, dtype).detach()
    reference = values_of(shape, 101, dtype).detach() - 1.0
    return {
        "Constant": {"weights": weights},
        "STCH": {"mu": 0.3},
        "STCH-full": {"mu": 0.05, "weights": weights, "reference": reference},
        "COSMOS": {"lambda_": 1.5, "weights": weights},
        "PBI": {"theta": 2.0, "weights": weights},
        "PBI-full": {"theta": 0.7, "weights": weights, "reference": reference},
        "IMTLL": {"shape": shape},
        "UW": {"shape": shape},
        "DWA": {"temperature": 1.3},
        "FAMO": {"shape": shape},
        "FAMO-full": {
            "shape": shape,
            "min_losses": reference - 2.0,
            "lr": 0.1,
            "weight_decay": 0.05,
        },
    }.get(name, {})


def make(name: str, shape: tuple[int, ...], dtype: Any = torch.float64, package: Any = ours) -> Any:
    """The scalarizer of our package, or of the peer's."""
    made: Scalarizer = getattr(package, name.partition("-")[0])(**arguments(name, shape, dtype))
    return made.to(dtype)
