"""The seam for those who watch steps: what a step is made of, told as it happens.

``Engine`` and ``jac_to_grad`` tell their observers; with none, nothing is done. Nothing is computed
or sent for an observer either, but the Gramians by layer for one that wants them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Outcome = Literal["weighed", "skipped", "overflowed"]


@dataclass(frozen=True, eq=False)
class Weighed:
    """What was weighed together: the rows of all parameters, or of a group of them.

    Attributes:
        name: The name of the group, "" for all parameters.
        gramian: The (generalized) Gramian, the same on every rank; None if none was formed.
        weights: The weights, half the dimensions of the Gramian; None if there are none.
        progress: J d [m] for an update d that is no combination of rows with these weights; else
            None, for the Gramian and the weights give it.
        update_norm: |d| of such an update.
    """

    name: str
    gramian: Tensor | None
    weights: Tensor | None
    progress: Tensor | None = None
    update_norm: float | None = None


@dataclass(frozen=True, eq=False)
class StepRecord:
    """A step whose weights are known.

    Attributes:
        groups: What was weighed, group by group; one of all parameters for an engine.
        layers: The parts of the Gramian that the layers contribute, if they were wanted.
        sample_dim: Along which dimension of the weights the objectives are samples, if any.
        per_sample: Whether objectives are samples, which change from step to step; None: unknown.
        outcome: "skipped": an objective was not finite, and the weights are zero; "overflowed": so
            was one that a GradScaler had scaled.
        rank: This rank among those that take the step.
        num_ranks: How many there are.
    """

    groups: tuple[Weighed, ...]
    layers: tuple[Weighed, ...] = ()
    sample_dim: int = 0
    per_sample: bool | None = None
    outcome: Outcome = "weighed"
    rank: int = 0
    num_ranks: int = 1


class Observer(ABC):
    """Watches steps. What it does must not raise: that would be one rank's error alone."""

    def wants_layers(self) -> bool:
        """Whether the step that began is to have the Gramians by layer; the same on every rank."""
        return False

    def wants_gramian(self) -> bool:
        """Whether a Gramian is to be formed that the step that began does not need."""
        return False

    def begins(self) -> None:
        """A call begins that leads to weights."""
        return None  # of no interest to some

    def gramian_known(self) -> None:
        """The Gramian of all ranks is known."""
        return None

    def weighs(self, weightings: Sequence[object]) -> None:
        """Weightings are about to run (on rank 0; elsewhere their results are waited for)."""
        return None

    def weighed(self, weightings: Sequence[object]) -> None:
        """They have run."""
        return None

    @abstractmethod
    def ends(self, step: StepRecord) -> None:
        """The weights are known and, if the call writes gradients, they are written."""


class Observers(Observer):
    """Tells any number of observers."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._all = list(observers)

    def __bool__(self) -> bool:
        return bool(self._all)

    def __deepcopy__(self, memo: dict[int, Any]) -> Observers:
        return Observers()  # whoever watches the original has not asked for the copy

    def __reduce__(self) -> tuple[Any, ...]:
        return Observers, ()

    def add(self, observer: Observer) -> Callable[[], None]:
        """Adds an observer; the function that is returned removes it."""
        self._all.append(observer)

        def remove() -> None:
            if observer in self._all:
                self._all.remove(observer)

        return remove

    def wants_layers(self) -> bool:
        return any([observer.wants_layers() for observer in self._all])

    def wants_gramian(self) -> bool:
        return any([observer.wants_gramian() for observer in self._all])

    def begins(self) -> None:
        for observer in self._all:
            observer.begins()

    def gramian_known(self) -> None:
        for observer in self._all:
            observer.gramian_known()

    def weighs(self, weightings: Sequence[object]) -> None:
        for observer in self._all:
            observer.weighs(weightings)

    def weighed(self, weightings: Sequence[object]) -> None:
        for observer in self._all:
            observer.weighed(weightings)

    def ends(self, step: StepRecord) -> None:
        for observer in self._all:
            observer.ends(step)


NOBODY = Observers()

# Aggregators are copied and saved; whoever watches them is not to be.
_of_aggregators: WeakIdKeyDictionary = WeakIdKeyDictionary()


def watch_aggregator(aggregator: object, observer: Observer) -> Callable[[], None]:
    """Lets an observer see the steps of ``jac_to_grad`` with an aggregator.

    Returns:
        A function that ends it.
    """
    if aggregator not in _of_aggregators:
        _of_aggregators[aggregator] = Observers()
    remove: Callable[[], None] = _of_aggregators[aggregator].add(observer)
    return remove


def observers_of(aggregators: Iterable[object]) -> Observers:
    """Who watches any of these aggregators, each once."""
    if not len(_of_aggregators):
        return NOBODY
    found: dict[int, Observer] = {}
    for aggregator in aggregators:
        observers = _of_aggregators.get(aggregator)
        for observer in observers._all if observers is not None else ():
            found[id(observer)] = observer
    return Observers(found.values())
