"""Base classes of aggregators, which map a Jacobian [m, n] to one vector [n]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, Self, TypeVar, overload

import torch
from torch import Tensor, nn

from jddist.linalg.gramian import compute_gramian
from jddist.linalg.matrix import Matrix, PSDMatrix, is_matrix

from ._columns import current_columns, runner_of, weigh
from ._weightings import Weighting, check_takes_gramians

_Get = TypeVar("_Get")
_Set = TypeVar("_Set")


class Aggregator(nn.Module, ABC):
    """Maps a Jacobian [m, n] to one vector [n].

    A subclass implements `forward`. Calling the aggregator also runs its hooks.

    Attributes:
        columnwise: Whether the result's column j depends on the Jacobian's column j alone.
        differentiable: Whether autograd may follow the computation; if not, it runs without.
    """

    columnwise: ClassVar[bool] = False
    differentiable: bool = True

    @property
    def acts_on_columns(self) -> bool:
        """Whether `forward` may be handed some columns of J only.

        What then depends on the other columns goes through `current_columns()`.
        """
        return self.columnwise

    @abstractmethod
    def forward(self, matrix: Matrix, /) -> Tensor:
        """Computes the vector [n]."""

    def __call__(self, matrix: Tensor, /) -> Tensor:
        """Aggregates the Jacobian and runs all hooks.

        Args:
            matrix: Jacobian of shape [m, n], or some of its columns; or a DTensor on a mesh of one
                dimension.

        Returns:
            Vector of shape [n]; a DTensor for a DTensor, with the columns where they were.

        Raises:
            ValueError: The matrix does not have two dimensions, or it is spread over ranks in a way
                that this aggregator cannot act on.
        """
        self._check_is_matrix(matrix)
        run = runner_of(matrix)
        if run is not None:
            return run(self, matrix)
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return super().__call__(matrix)

    @staticmethod
    def _check_is_matrix(matrix: Tensor) -> None:
        if not is_matrix(matrix):
            raise ValueError(
                "An aggregator expects a Jacobian of shape [m, n]. Found a tensor of shape "
                f"{tuple(matrix.shape)}: flatten the dimensions of the parameters into one."
            )

    def __repr__(self) -> str:
        parameters = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._forwarded())
        return f"{type(self).__name__}({parameters})"

    def __str__(self) -> str:
        return type(self).__name__

    @classmethod
    def _forwarded(cls) -> list[str]:
        classes = reversed(cls.__mro__)
        return [name for c in classes for name, v in vars(c).items() if isinstance(v, Forwarded)]


class WeightedAggregator(Aggregator):
    """Combines the rows of the Jacobian with the weights that a weighting gives it.

    Args:
        weighting: Maps the Jacobian [m, n] to weights [m].
    """

    def __init__(self, weighting: Weighting[Matrix]) -> None:
        super().__init__()
        self.weighting = weighting

    @property
    def acts_on_columns(self) -> bool:
        """Whether the weighting does."""
        return self.columnwise or self.weighting.acts_on_columns

    def forward(self, matrix: Matrix, /) -> Tensor:
        return combine(self.weighting(matrix), matrix)


def combine(weights: Tensor, matrix: Tensor) -> Tensor:
    """The combination [n] of the rows with weights [m], which may be of a wider dtype.

    Weights too large for the dtype of the rows become its largest, as they do in any dtype.
    """
    if weights.dtype != matrix.dtype:
        bound = torch.finfo(matrix.dtype).max
        weights = weights.clamp(-bound, bound).to(matrix.dtype)
    return weights @ matrix


class GramianWeightedAggregator(WeightedAggregator):
    """Combines the rows of the Jacobian with weights that depend on its Gramian alone.

    Args:
        gramian_weighting: Maps the Gramian [m, m] to weights [m].

    Raises:
        ValueError: The weighting needs the Jacobian itself.
    """

    def __init__(self, gramian_weighting: Weighting[PSDMatrix]) -> None:
        super().__init__(WeightingOfGramian(gramian_weighting))
        self.gramian_weighting = gramian_weighting
        self.differentiable = gramian_weighting.differentiable


class WeightingOfGramian(Weighting[Matrix]):
    """Weighs a Jacobian, or its shard at hand, through the Gramian of all its columns."""

    acts_on_columns = True

    def __init__(self, weighting: Weighting[PSDMatrix]) -> None:
        check_takes_gramians(weighting)
        super().__init__()
        self.weighting = weighting

    def forward(self, matrix: Matrix, /) -> Tensor:
        gramian = current_columns().sum(compute_gramian(matrix))
        return weigh(self.weighting, gramian)


class Forwarded(Generic[_Get, _Set]):
    """A hyperparameter of a method that lives on its weighting.

    `beta = Forwarded[float, float]()` in the body of an aggregator reads and writes
    `aggregator.gramian_weighting.beta`, where it is validated, and shows up in the `repr`. The type
    parameters are what is read and what may be written.

    Args:
        through: The attribute on which the hyperparameter lives.
    """

    def __init__(self, through: str = "gramian_weighting") -> None:
        self._through = through

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: nn.Module, owner: type) -> _Get: ...

    def __get__(self, instance: nn.Module | None, owner: type) -> Any:
        return self if instance is None else getattr(getattr(instance, self._through), self._name)

    def __set__(self, instance: nn.Module, value: _Set) -> None:
        setattr(getattr(instance, self._through), self._name, value)
