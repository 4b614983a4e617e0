"""The recorder: watches steps as they happen, on every rank, and writes on one."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self

import torch
import torch.distributed as dist
from torch import nn

from jddist._observing import Observer, StepRecord, watch_aggregator
from jddist.aggregation import Aggregator, Flattening
from jddist.autogram import Engine
from jddist.distribution.collectives import bytes_sent

from ._weighting_hooks import watch_weighting
from .projectors import ProjectorCounts
from .record import Record, Session
from .sinks import FILE_NAME, Function, JsonLines, Sink
from .summarize import Parts, Summarizer

_LOG = logging.getLogger("jddist.monitoring")
_P = ParamSpec("_P")


def _guarded(
    method: Callable[Concatenate[Recorder, _P], None],
) -> Callable[Concatenate[Recorder, _P], None]:
    """What fails here must not end one rank's training and leave the others waiting."""

    @wraps(method)
    def run(self: Recorder, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self._complain("recording", error)

    return run


class Watching:
    """What ``Recorder.watch`` returns: ends with ``end()``, or as a context manager."""

    def __init__(self, removers: Sequence[Callable[[], None]]) -> None:
        self._removers = list(removers)

    def end(self) -> None:
        """Stops watching."""
        while self._removers:
            self._removers.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Recorder(Observer):
    """Records what steps are made of: weights, conflicts, norms, times, bytes.

    Make one on every rank, in the same way. Rank 0 writes; nothing is sent for it (but see
    ``per_layer_every``). Everything follows from the Gramian and the weights, which rank 0 has
    anyway, and is computed at every ``every``-th step only. On CUDA the host waits for the device
    there, and at the end of the step before, so that durations are right; at other steps it does
    not. What fails while recording, a full disk or a sink that raises, is a warning, once, and
    training goes on the same on all ranks::

        recorder = Recorder("runs/first", names=["depth", "normals"])
        recorder.watch(engine)
        for x, y in loader:
            ...
            engine.backward(losses, weighting)
            optimizer.step()
        recorder.close()

    A step is one call that gives weights. In a folder that has records already, steps are counted
    on from the last one, or from ``load_state_dict``.

    Args:
        run_dir: The folder of the run, into whose ``steps.jsonl`` records are written. None: only
            the sinks get them.
        sinks: Where else records go: ``TensorBoard(folder)``, or any function of a ``Record``.
        every: Every how many steps one is recorded. The first one always is.
        names: The names of the tasks, in their order.
        per_layer_every: Every how many steps an ``Engine`` computes the Gramian of each layer by
            itself, for records of each layer. On several ranks such a step sends (L-1) m² numbers
            more for L layers, and smaller messages; the Gramian is then the sum of the layers', the
            same up to rounding. It has to be the same on all ranks. None: never.
            (``jac_to_grad_groups`` gives the groups' records without that.)
        groups: The names of the groups of ``jac_to_grad_groups``, in their order. By default what
            their parameters' names have in common, if the model is attached.
        rank: The rank of the default process group that writes.

    Raises:
        ValueError: ``every`` or ``per_layer_every`` is not positive.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | None,
        *,
        sinks: Iterable[Sink | Callable[[Record], object]] = (),
        every: int = 10,
        names: Sequence[str] | None = None,
        per_layer_every: int | None = None,
        groups: Sequence[str] | None = None,
        rank: int = 0,
    ) -> None:
        for name, value in (("every", every), ("per_layer_every", per_layer_every)):
            if value is not None and value < 1:
                raise ValueError(f"Found {name}={value}; expected a positive number of steps.")
        self.every = every
        self.per_layer_every = per_layer_every
        self.names = None if names is None else tuple(map(str, names))
        self._summarizer = Summarizer(self.names, None if groups is None else tuple(groups))
        self._rank = rank
        self._sinks = [s if isinstance(s, Sink) else Function(s) for s in sinks]
        if run_dir is not None:
            self._sinks.insert(0, JsonLines(Path(run_dir) / FILE_NAME))
        self._weightings: Sequence[object] = ()
        self._watching: Watching | None = None
        self._complained: set[object] = set()
        self._first_step: int | None = None  # of this session; None: after the last one on record
        self._steps = 0  # of this session
        self._here: bool | None = None  # whether this rank writes
        self._begun = 0  # calls, of this session: the same on every rank
        self._open = False
        self._begun_sinks: list[Sink] = []
        self._counts: dict[str, int] = {}
        self._projectors = ProjectorCounts()
        self._ended_at: float | None = None
        self._weighed_at: float | None = None
        self._seconds: dict[str, float] = {}
        self._due = 0  # steps until the next record
        self._forget_step()

    @property
    def step(self) -> int:
        """The number of the next step."""
        return (self._first_step or 0) + self._steps

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs, for steps to be counted on from it."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Counts on from a checkpoint. Records of later steps that are in the folder count no more.

        Raises:
            RuntimeError: There were steps already.
        """
        if self._begun:
            raise RuntimeError(
                "Found a recorder that has recorded steps already; expected a new one. Load its "
                "state before the first step."
            )
        self._first_step = int(state["step"])

    def watch(self, *targets: Engine | nn.Module) -> Watching:
        """Starts recording the steps of an engine, or of aggregators.

        Args:
            targets: One ``Engine``; or the aggregators of ``jac_to_grad``, ``mtl_backward`` or
                ``jac_to_grad_groups``; or, in one process, a weighting (of torchjd's too) that you
                call yourself.

        Returns:
            What ends it, by ``end()`` or as a context manager.

        Raises:
            ValueError: The recorder watches something already, or the targets are of no such kind.
        """
        if self._watching is not None and self._watching._removers:
            raise ValueError(
                "Found a recorder that watches something already; expected one recorder for each "
                "stream of steps, in a folder of its own. End the first watch, or make another "
                "Recorder."
            )
        aggregators = [target for target in targets if isinstance(target, Aggregator)]
        if len(targets) == 1 and isinstance(targets[0], Engine):
            removers = [targets[0].observers.add(self)]
        elif targets and len(aggregators) == len(targets):
            removers = [watch_aggregator(aggregator, self) for aggregator in dict.fromkeys(targets)]
        elif len(targets) == 1 and isinstance(targets[0], nn.Module):
            removers = [watch_weighting(targets[0], self)]
        else:
            kinds = ", ".join(type(target).__name__ for target in targets) or "nothing"
            raise ValueError(
                f"Found {kinds} to watch; expected one Engine, one or several aggregators, or one "
                "weighting that is a module. Pass the list of aggregators as watch(*aggregators)."
            )
        self._watching = Watching(removers)
        return self._watching

    def close(self) -> None:
        """Stops watching, and closes the sinks. Nothing is recorded any more."""
        if self._watching is not None:
            self._watching.end()
        for sink in self._begun_sinks:
            self._try(sink, partial(sink.close, self.step - 1, self._counts))
        self._begun_sinks, self._counts = [], {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return self  # files are not copied

    # What follows is called by what is watched.

    def wants_layers(self) -> bool:
        every = self.per_layer_every
        return self._open and every is not None and (self._begun - 1) % every == 0

    def wants_gramian(self) -> bool:
        return self._recording

    @_guarded
    def begins(self) -> None:
        self._begun += 1
        if self._open:  # the previous call raised
            self._seconds = {}
        here, self._open = self._writes(), True
        self._recording = here and (self._due <= 0 or self.wants_layers())
        if self._recording:
            self._sent_before = bytes_sent()
            self._began_at = self._clock()

    @_guarded
    def gramian_known(self) -> None:
        if self._recording and "gramian" not in self._seconds:
            self._seconds["gramian"] = self._clock() - self._began_at

    @_guarded
    def weighs(self, weightings: Sequence[object]) -> None:
        if not self._writes():
            return
        self._projectors.before(weightings)
        self._weightings = weightings
        if self._takes_times():
            self._weighs_at = self._clock()

    @_guarded
    def weighed(self, weightings: Sequence[object]) -> None:
        if not self._writes():
            return
        if self._takes_times():
            self._weighed_at = self._clock()
            before = self._seconds.get("weighting", 0.0)
            self._seconds["weighting"] = before + self._weighed_at - self._weighs_at
        self._add(self._projectors.after())

    @_guarded
    def ends(self, step: StepRecord) -> None:
        recording, self._recording = self._recording, False
        here, self._open = self._writes(), False
        number = self._number_of_step()
        self._steps += 1
        self._due -= 1
        if not here:
            return
        self._add({"steps": 1})
        if recording or number == self._first_step:  # from the first step on, records or not
            self._begin_sinks(step.num_ranks)
        if step.outcome != "weighed":
            self._add({step.outcome: 1})
        elif recording:
            self._record(number, step)
        self._forget_step()
        # The next record's "step" starts here.
        layers = self.per_layer_every is not None and self._begun % self.per_layer_every == 0
        self._ended_at = self._clock(wait=self._due <= 0 or layers)

    def _record(self, number: int, step: StepRecord) -> None:
        now = self._clock(wait=True)
        if self._weighed_at is not None:
            self._seconds["gradient"] = now - max(self._weighed_at, self._began_at)
        if self._ended_at is not None:
            self._seconds["step"] = now - self._ended_at
        parts = self._summarizer(step)
        self._check_names(parts)
        record = Record(
            number,
            time.time(),
            parts.per_sample,
            parts.groups,
            parts.layers,
            parts.tasks,
            dict(self._seconds),
            bytes_sent() - self._sent_before,
            dict(self._counts),
            step.num_ranks,
            self.names,
        )
        # Only now: what could not be summed up is counted with the next record.
        self._counts = {}
        self._due = self.every - 1
        for sink in self._begun_sinks:
            self._try(sink, partial(sink, record))

    def _check_names(self, parts: Parts) -> None:
        counts = {s.objectives for s in (*parts.groups, *filter(None, [parts.tasks]))}
        if self.names is not None and len(self.names) not in counts:
            self._say(
                "names",
                f"Found {len(self.names)} names for {sorted(counts)} objectives; expected as many. "
                "Numbers stand for them. Give Recorder(names=...) one name per task.",
            )

    def _begin_sinks(self, num_ranks: int) -> None:
        """Begins those that have not begun, or could not."""
        waiting = [sink for sink in self._sinks if sink not in self._begun_sinks]
        if not waiting:
            return
        session = Session(
            self._first_step or 0,
            time.time(),
            self.names,
            self.every,
            ", ".join(dict.fromkeys(map(_name_of, self._weightings))),
            num_ranks,
        )
        for sink in waiting:
            if self._try(sink, partial(sink.begin, session)):
                self._begun_sinks.append(sink)

    def _number_of_step(self) -> int:
        if self._first_step is None:
            last = [-1]
            for sink in self._sinks if self._writes() else ():
                self._try(sink, lambda s=sink: last.append(s.last_step()))  # type: ignore[misc]
            self._first_step = max(last) + 1
        return self.step

    def _writes(self) -> bool:
        if self._here is None:
            started = dist.is_available() and dist.is_initialized()
            self._here = not started or dist.get_rank() == self._rank
        return self._here

    def _clock(self, wait: bool | None = None) -> float:
        """Seconds; once the device is done, if this step is recorded."""
        wait = self._recording if wait is None else wait
        if wait and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _takes_times(self) -> bool:
        """Also outside of a step: the weights of two batches belong to the step that is to come."""
        return self._recording or not self._open

    def _forget_step(self) -> None:
        self._recording = False
        self._seconds = {}
        self._began_at = self._weighs_at = 0.0
        self._weighed_at = None
        self._sent_before = 0.0

    def _add(self, counts: dict[str, int]) -> None:
        for name, count in counts.items():
            if count:
                self._counts[name] = self._counts.get(name, 0) + count

    def _try(self, sink: Sink, call: Callable[[], object]) -> bool:
        try:
            call()
        except Exception as error:
            self._complain(sink, error)
            return False
        return True

    def _complain(self, where: object, error: Exception) -> None:
        name = where if isinstance(where, str) else f"the sink {type(where).__name__}"
        self._say(
            where,
            f"A step could not be recorded: {name} raised {type(error).__name__}: {error}. "
            "Training goes on, and so do attempts to record. This is said once.",
        )

    def _say(self, about: object, text: str) -> None:
        """Warns once; where warnings are errors, the log has to do."""
        if about in self._complained:
            return
        self._complained.add(about)
        try:
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        except Warning:
            _LOG.error(text)


def _name_of(weighting: object) -> str:
    """The class of a weighting, and of the one inside of it where that says more."""
    inner = getattr(weighting, "weighting", None)
    name = type(weighting).__name__
    return f"{name}({type(inner).__name__})" if isinstance(weighting, Flattening) else name
