"""Base classes of weightings, which map a statistic of the Jacobian to one weight per objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from jddist.linalg.gramian import flatten_gramian
from jddist.linalg.matrix import Matrix, PSDMatrix, PSDTensor, is_psd_matrix, is_psd_tensor

_Stat_contra = TypeVar("_Stat_contra", contravariant=True, bound=Tensor)
_Input = TypeVar("_Input", bound=Tensor)
_Output = TypeVar("_Output", bound=Tensor)


class Weighting(nn.Module, ABC, Generic[_Stat_contra]):
    """Maps a statistic of the Jacobian, mostly its Gramian [m, m], to weights [m].

    A subclass implements `forward`. Calling the weighting also runs its hooks.

    Attributes:
        differentiable: Whether autograd may follow the computation; if not, it runs without.
        needs_jacobian: Whether the statistic is the Jacobian itself.
        pure: Whether the weights follow from the statistic and the settings alone, not from earlier
            calls or random numbers. Of many groups' weightings the ranks then share out the work;
            others run on rank 0. A subclass has to say it for itself.
    """

    differentiable: ClassVar[bool] = True
    needs_jacobian: ClassVar[bool] = False
    pure: ClassVar[bool] = False

    @property
    def acts_on_columns(self) -> bool:
        """Whether it may be handed some columns of J only, and finds the others' part itself."""
        return False

    @abstractmethod
    def forward(self, stat: _Stat_contra, /) -> Tensor:
        """Computes the weights [m]."""

    def __call__(self, stat: Tensor, /) -> Tensor:
        """Computes the weights and runs all hooks.

        Args:
            stat: The statistic that this weighting is made for.

        Returns:
            Weights of shape [m].
        """
        if self.differentiable or not torch.is_grad_enabled():
            return super().__call__(stat)
        with torch.no_grad():
            return super().__call__(stat)

    def __lshift__(self, function: Callable[[_Input], _Stat_contra]) -> Weighting[_Input]:
        """`weighting << function` applies the function first."""
        return Composition(self, function)


class Composition(Weighting[_Input]):
    """A weighting of what a function makes of the input; what `<<` returns."""

    def __init__(self, weighting: Weighting[_Output], function: Callable[[_Input], _Output]):
        super().__init__()
        self.weighting = weighting
        self.function = function

    def forward(self, stat: _Input, /) -> Tensor:
        return self.weighting(self.function(stat))


class GramianWeighting(Weighting[PSDMatrix]):
    """A weighting of Gramians [m, m]."""

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """Computes the weights of a Gramian and runs all hooks.

        Args:
            gramian: Gramian of shape [m, m].

        Returns:
            Weights of shape [m].

        Raises:
            ValueError: The shape is not [m, m].
        """
        if not is_psd_matrix(gramian):
            raise ValueError(
                f"{type(self).__name__} expects a Gramian of shape [m, m]. Found shape "
                f"{tuple(gramian.shape)}. For the generalized Gramian of an output that is not a "
                f"vector, use Flattening({type(self).__name__}(...))."
            )
        return super().__call__(gramian)


class RowCountWeighting(Weighting[Matrix]):
    """A weighting that looks at nothing but the number of rows, the dtype and the device.

    It may therefore be handed J, some columns of it, or its Gramian alike.
    """

    acts_on_columns = True


def check_takes_gramians(weighting: object) -> None:
    """Raises ValueError if the weighting, or one that it wraps, needs the Jacobian itself."""
    if not isinstance(weighting, nn.Module):
        return
    for module in weighting.modules():
        if isinstance(module, Weighting) and module.needs_jacobian:
            name = type(module).__name__
            raise ValueError(
                f"Found {name} where there is only a Gramian; expected a weighting of Gramians, "
                f"since {name} looks at the Jacobian itself. Use the Jacobian: "
                f"WeightedAggregator({name}(...)) with jac_to_grad."
            )


class GeneralizedWeighting(nn.Module, ABC):
    """Maps a generalized Gramian [m1, ..., mk, mk, ..., m1] to weights [m1, ..., mk]."""

    @abstractmethod
    def forward(self, generalized_gramian: PSDTensor, /) -> Tensor:
        """Computes the weights [m1, ..., mk]."""

    def __call__(self, generalized_gramian: Tensor, /) -> Tensor:
        """Computes the weights and runs all hooks.

        Args:
            generalized_gramian: Tensor of shape [m1, ..., mk, mk, ..., m1].

        Returns:
            Weights of shape [m1, ..., mk].

        Raises:
            ValueError: The second half of the shape is not the first in reverse.
        """
        if not is_psd_tensor(generalized_gramian):
            raise ValueError(
                f"{type(self).__name__} expects a generalized Gramian of shape [m1, ..., mk, mk, "
                f"..., m1]. Found shape {tuple(generalized_gramian.shape)}."
            )
        return super().__call__(generalized_gramian)


class Flattening(GeneralizedWeighting):
    """Treats every element of an output of any shape as one objective.

    The generalized Gramian is flattened to [m, m] with m = m1 * ... * mk, weighted, and the weights
    are brought to the shape [m1, ..., mk].

    Args:
        weighting: The weighting of the flattened Gramian.
    """

    def __init__(self, weighting: Weighting[PSDMatrix]) -> None:
        super().__init__()
        self.weighting = weighting

    def forward(self, generalized_gramian: PSDTensor, /) -> Tensor:
        half_shape = generalized_gramian.shape[: generalized_gramian.ndim // 2]
        return self.weighting(flatten_gramian(generalized_gramian)).reshape(half_shape)
