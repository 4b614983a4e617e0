"""What is recorded of a step, and its form in JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .statistics import Array, Statistics, below_diagonal, pairs_of

# Of many objectives, these quantiles are recorded.
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
# And how many pairs have a cosine in each of so many equal parts of [-1, 1].
BINS = 40

_NUMBERS = (
    "conflict_rate",
    "imbalance",
    "mean_norm",
    "update_norm",
    "update_conflict_rate",
    "update_mean_cosine",
)


@dataclass(frozen=True, eq=False)
class Spread:
    """A distribution of numbers: of samples, which are others in every step.

    Attributes:
        quantiles: At ``QUANTILES``, NaN left out.
        histogram: For cosines, the number in each of ``BINS`` equal parts of [-1, 1]; else None.
    """

    quantiles: Array
    histogram: Array | None = None

    @staticmethod
    def of(values: Array, *, histogram: bool = False) -> Spread:
        """The distribution of some numbers."""
        values = np.sort(values[~np.isnan(values)])
        counts = None
        if histogram:
            parts = np.minimum(((values + 1.0) * (0.5 * BINS)).astype(np.intp), BINS - 1)
            counts = np.bincount(parts, minlength=BINS).astype(np.float64)
        if not len(values):
            return Spread(np.full(len(QUANTILES), np.nan), counts)
        # As np.quantile does it, which takes ten times as long on few numbers.
        places = np.array(QUANTILES) * (len(values) - 1)
        return Spread(np.interp(places, np.arange(len(values)), values), counts)


Numbers = Array | Spread


@dataclass(frozen=True, eq=False)
class Summary:
    """What is recorded of the objectives with respect to some parameters.

    Arrays have one entry per objective; of objectives that are too many, or samples, there are
    distributions instead.

    Attributes:
        name: The layer or group of parameters; "" for all of them.
        objectives: The number of objectives m.
        weights: The weights, or None if the method has none.
        norms: The lengths of the gradients, or None if no Gramian is at hand.
        cosines: Cosine similarities of the gradients, [m, m], or their distribution over pairs.
        update_cosines: Cosine similarities of the update with the gradients.
        conflict_rate: See ``Statistics``, as the following.
        imbalance: The longest gradient over the shortest.
        mean_norm: The length of the mean gradient.
        update_norm: The length of the update.
        update_conflict_rate: The share of the objectives that a small step makes worse.
        update_mean_cosine: The cosine similarity of the update with the mean gradient.
    """

    name: str
    objectives: int
    weights: Numbers | None = None
    norms: Numbers | None = None
    cosines: Numbers | None = None
    update_cosines: Numbers | None = None
    conflict_rate: float = math.nan
    imbalance: float = math.nan
    mean_norm: float = math.nan
    update_norm: float = math.nan
    update_conflict_rate: float = math.nan
    update_mean_cosine: float = math.nan

    @staticmethod
    def of(name: str, statistics: Statistics, *, each: bool) -> Summary:
        """Sums up statistics, objective by objective if ``each``."""

        def kept(values: Array | None) -> Numbers | None:
            return values if each or values is None else Spread.of(values)

        cosines: Numbers = statistics.cosines
        if not each:
            cosines = Spread.of(pairs_of(statistics.cosines), histogram=True)
        return Summary(
            name,
            len(statistics.norms),
            kept(statistics.weights),
            kept(statistics.norms),
            cosines,
            kept(statistics.update_cosines),
            **{number: getattr(statistics, number) for number in _NUMBERS},
        )

    @staticmethod
    def of_weights(name: str, weights: Array | None, *, each: bool) -> Summary:
        """What there is without a Gramian."""
        if weights is None:
            return Summary(name, 0)
        return Summary(name, len(weights), weights if each else Spread.of(weights))

    def as_json(self) -> dict[str, Any]:
        """As JSON values; cosines of each pair are rounded to six digits."""
        cosines = self.cosines
        if isinstance(cosines, np.ndarray):
            cosines = pairs_of(cosines).round(6)
        values = {
            "name": self.name,
            "objectives": self.objectives,
            "weights": _to_json(self.weights),
            "norms": _to_json(self.norms),
            "cosines": _to_json(cosines),
            "update_cosines": _to_json(self.update_cosines),
            **{number: _finite(getattr(self, number)) for number in _NUMBERS},
        }
        return {name: value for name, value in values.items() if value is not None}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Summary:
        """The inverse of ``as_json``."""
        cosines = _from_json(values.get("cosines"))
        if isinstance(cosines, np.ndarray):
            cosines = _from_triangle(cosines, int(values["objectives"]))
        return Summary(
            str(values["name"]),
            int(values["objectives"]),
            _from_json(values.get("weights")),
            _from_json(values.get("norms")),
            cosines,
            _from_json(values.get("update_cosines")),
            **{number: float(values.get(number, math.nan)) for number in _NUMBERS},
        )

    def scalars(self, names: Sequence[str] | None = None) -> dict[str, float]:
        """What can be drawn as curves, by name; ``names`` are those of the objectives."""
        found = {number: getattr(self, number) for number in _NUMBERS}
        for kind, values in (
            ("weights", self.weights),
            ("norms", self.norms),
            ("update_cosines", self.update_cosines),
        ):
            if isinstance(values, Spread):
                labels = [f"{100 * q:g} %" for q in QUANTILES]
                values = values.quantiles
            elif values is None:
                continue
            else:
                labels = names_of(names, len(values))
            for label, value in zip(labels, values.tolist(), strict=True):
                found[f"{kind}/{label}"] = value
        if isinstance(self.cosines, Spread):
            found["cosines/50 %"] = float(self.cosines.quantiles[QUANTILES.index(0.5)])
        return {name: value for name, value in found.items() if math.isfinite(value)}


@dataclass(frozen=True, eq=False)
class Record:
    """One recorded step.

    Attributes:
        step: Counted from 0 over the whole run, resumed parts included.
        time: Seconds since 1970.
        per_sample: Whether objectives are samples, which are others in every step.
        groups: All parameters, or the groups that were weighed by themselves.
        layers: The layers' parts, where they were asked for.
        tasks: Of objectives that are samples x tasks, the tasks (means over the samples).
        seconds: Durations: "gramian" (up to the Gramian), "weighting" (the solver), "gradient"
            (what follows within the call), and "step": since the end of the previous step.
        bytes_sent: By this rank within the call; without what the model's wrapper sends itself.
        counts: What happened since the previous record: "steps", those "skipped" for an objective
            that was not finite or "overflowed" under a GradScaler, calls of projectors
            "below_norm_eps" (where UPGrad and DualProj ignore conflicts), and problems solved by
            "fallbacks" to quadprog since their solution was not certified.
        num_ranks: The number of ranks.
        names: The names of the objectives or tasks, if they were given.
    """

    step: int
    time: float
    per_sample: bool
    groups: tuple[Summary, ...]
    layers: tuple[Summary, ...] = ()
    tasks: Summary | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_sent: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    num_ranks: int = 1
    names: tuple[str, ...] | None = None

    def scalars(self) -> dict[str, float]:
        """Every number of the record by a name with slashes, as W&B and TensorBoard like them.

        A sink for W&B is ``lambda record: wandb.log(record.scalars(), record.step)``.
        """
        found: dict[str, float] = {}
        for summary in self.groups:
            prefix = f"groups/{summary.name}/" if summary.name else ""
            found.update({prefix + k: v for k, v in summary.scalars(self.names).items()})
        for layer in self.layers:
            found.update(
                {
                    f"layers/{layer.name}/{number}": value
                    for number in _NUMBERS
                    if math.isfinite(value := getattr(layer, number))
                }
            )
        if self.tasks is not None:
            found.update({f"tasks/{k}": v for k, v in self.tasks.scalars(self.names).items()})
        found.update({f"seconds/{name}": value for name, value in self.seconds.items()})
        found.update({f"share/{name}": value for name, value in self.shares().items()})
        found["bytes_sent"] = self.bytes_sent
        found.update({f"counts/{name}": float(n) for name, n in self.counts.items()})
        return found

    def shares(self) -> dict[str, float]:
        """The parts of the duration of the step, from 0 to 1; empty if that is not known."""
        step = self.seconds.get("step", 0.0)
        parts = {name: value for name, value in self.seconds.items() if name != "step"}
        return {name: value / step for name, value in parts.items()} if step > 0 else {}

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values["groups"] = [summary.as_json() for summary in self.groups]
        values["layers"] = [summary.as_json() for summary in self.layers]
        values["tasks"] = None if self.tasks is None else self.tasks.as_json()
        del values["names"]  # the session's
        return {name: v for name, v in values.items() if v is not None and v != []}

    @staticmethod
    def from_json(values: Mapping[str, Any], names: tuple[str, ...] | None = None) -> Record:
        """The inverse of ``as_json``."""
        tasks = values.get("tasks")
        return Record(
            int(values["step"]),
            float(values["time"]),
            bool(values["per_sample"]),
            tuple(Summary.from_json(v) for v in values.get("groups", ())),
            tuple(Summary.from_json(v) for v in values.get("layers", ())),
            None if tasks is None else Summary.from_json(tasks),
            {name: float(v) for name, v in values.get("seconds", {}).items()},
            float(values.get("bytes_sent", 0.0)),
            {name: int(v) for name, v in values.get("counts", {}).items()},
            int(values.get("num_ranks", 1)),
            names,
        )


@dataclass(frozen=True)
class Session:
    """What is the same for all records of one process.

    Attributes:
        step: The first step. What an earlier session recorded from this step on counts no more:
            training went back to a checkpoint.
        time: Seconds since 1970.
        names: The names of the objectives or tasks, if they were given.
        every: Every how many steps one is recorded.
        method: What weighs.
        num_ranks: The number of ranks.
    """

    step: int
    time: float
    names: tuple[str, ...] | None = None
    every: int = 1
    method: str = ""
    num_ranks: int = 1


def names_of(names: Sequence[str] | None, count: int) -> list[str]:
    """The given names, or numbers if there are none for so many objectives."""
    return (
        list(names) if names is not None and len(names) == count else list(map(str, range(count)))
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _to_json(values: Numbers | None) -> Any:
    if isinstance(values, Spread):
        found: dict[str, Any] = {"quantiles": [_finite(v) for v in values.quantiles.tolist()]}
        if values.histogram is not None:
            found["histogram"] = [int(n) for n in values.histogram]
        return found
    if values is None:
        return None
    listed = values.tolist()
    return listed if np.isfinite(values).all() else [_finite(v) for v in listed]


def _from_json(values: Any) -> Numbers | None:
    if values is None:
        return None
    if isinstance(values, Mapping):
        histogram = values.get("histogram")
        return Spread(_array(values["quantiles"]), None if histogram is None else _array(histogram))
    return _array(values)


def _array(values: Sequence[float | None]) -> Array:
    return np.array([math.nan if v is None else v for v in values], dtype=np.float64)


def _from_triangle(triangle: Array, m: int) -> Array:
    cosines = np.eye(m)
    below = below_diagonal(m)
    cosines[below] = triangle
    cosines.T[below] = triangle
    return cosines
