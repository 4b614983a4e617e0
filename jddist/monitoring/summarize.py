"""From a step as it was taken to what is recorded of it."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod

import numpy as np
from torch import Tensor

from jddist._observing import StepRecord, Weighed

from .record import Summary
from .statistics import Array, matrix_of, of_tasks, statistics_of

# More objectives than that are recorded as distributions, unless they have names.
MOST_EACH = 64
# As are more than that, if it is not known whether they are samples.
MOST_EACH_UNKNOWN = 32


@dataclass(frozen=True)
class Parts:
    """The parts of a record that say something of gradients; see ``Record``."""

    per_sample: bool
    groups: tuple[Summary, ...]
    layers: tuple[Summary, ...]
    tasks: Summary | None


class Summarizer:
    """Sums up steps.

    Args:
        names: The names of the tasks, if they are known.
        groups: The names of the groups, if they are known.
    """

    def __init__(self, names: tuple[str, ...] | None, groups: tuple[str, ...] | None) -> None:
        self._names = names
        self._groups = groups

    def __call__(self, step: StepRecord) -> Parts:
        named = self._groups
        if named is not None and len(named) != len(step.groups):
            raise ValueError(
                f"Found names of {len(named)} groups; expected {len(step.groups)}. Give "
                "Recorder(groups=...) one name for each group."
            )
        per_sample = self._is_per_sample(step)
        groups = [
            _summary(w, w.name if named is None else named[i], step, per_sample)
            for i, w in enumerate(step.groups)
        ]
        layers = [_summary(w, w.name, step, per_sample) for w in step.layers]
        tasks = None
        first = step.groups[0] if len(step.groups) == 1 else None
        if step.per_sample and first is not None:
            tasks = self._of_tasks(first, step.sample_dim)
        return Parts(per_sample, tuple(groups), tuple(layers), tasks)

    def _is_per_sample(self, step: StepRecord) -> bool:
        m = max(map(_num_objectives, step.groups), default=0)
        if step.per_sample is not None:
            return step.per_sample or (m > MOST_EACH and m != len(self._names or ()))
        return m > MOST_EACH_UNKNOWN and m != len(self._names or ())

    def _of_tasks(self, weighed: Weighed, sample_dim: int) -> Summary | None:
        if weighed.weights is None or weighed.gramian is None:
            return None
        shape = weighed.weights.shape
        tasks = prod(n for dim, n in enumerate(shape) if dim != sample_dim)
        if len(shape) < 2 or not 1 < tasks <= MOST_EACH or not shape[sample_dim]:
            return None
        gramian, weights = _array(weighed.gramian), _array(weighed.weights)
        matrix, flat = matrix_of(gramian), weights.reshape(-1)
        progress = (matrix @ flat).reshape(shape)
        length = float(np.sqrt(max(0.0, float(flat @ progress.reshape(-1)))))
        reduced, of_task, along = of_tasks(gramian, weights, progress, sample_dim)
        return Summary.of("", statistics_of(reduced, of_task, along, length), each=True)


def _num_objectives(weighed: Weighed) -> int:
    if weighed.weights is not None:
        return weighed.weights.numel()
    return 0 if weighed.gramian is None else isqrt(weighed.gramian.numel())


def _summary(weighed: Weighed, name: str, step: StepRecord, per_sample: bool) -> Summary:
    weights = None if weighed.weights is None else _array(weighed.weights).reshape(-1)
    if weighed.gramian is None:
        return Summary.of_weights(name, weights, each=not per_sample)
    gramian = matrix_of(_array(weighed.gramian))
    progress = None if weighed.progress is None else _array(weighed.progress)
    statistics = statistics_of(gramian, weights, progress, weighed.update_norm)
    return Summary.of(name, statistics, each=not per_sample)


def _array(tensor: Tensor) -> Array:
    found: Array = tensor.detach().double().cpu().numpy()
    return found
