"""Scalarizers: from the values of all objectives to one scalar, one file per method.

On several ranks a scalarizer sees the values of its own rank, and the wrapper averages the
gradients of the ranks' scalars. For `Mean`, `Sum` and `Constant` that is the gradient of the scalar
of the averaged values. For the others it is not, unless every rank is given the same, global
values:

- `GeometricMean`, `FAMO`, `STCH`, `COSMOS` and `PBI` are not linear in the values.
- `DWA` and `FAMO` would remember different values on every rank, and weigh differently.
- The parameters of `IMTLL` and `UW` do not belong to the wrapped model, so their gradients are not
  averaged and they drift apart.
- `Random` draws on every rank: differently, unless the ranks are seeded alike.

So average the values over ranks before, keeping this rank's gradient: a few lines, which the page
docs/methods.md gives. Everything that is learned or remembered then stays the same on all ranks
(`Random` still needs equal seeds). `IMTLL` and `UW` may instead be made submodules of the wrapped
model, which then returns the scalar from its `forward`.
"""

from __future__ import annotations

from ._bases import Scalarizer
from ._constant import Constant
from ._cosmos import COSMOS
from ._dwa import DWA
from ._famo import FAMO
from ._geometric_mean import GeometricMean
from ._imtll import IMTLL
from ._mean import Mean
from ._pbi import PBI
from ._random import Random
from ._stch import STCH
from ._sum import Sum
from ._uw import UW

__all__ = [
    "COSMOS",
    "DWA",
    "FAMO",
    "IMTLL",
    "PBI",
    "STCH",
    "UW",
    "Constant",
    "GeometricMean",
    "Mean",
    "Random",
    "Scalarizer",
    "Sum",
]
