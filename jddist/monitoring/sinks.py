"""Where records go: a file of JSON lines, TensorBoard, or any function."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jddist._version import __version__

from .record import Record, Session, Spread

VERSION = 1
FILE_NAME = "steps.jsonl"


class Sink(ABC):
    """Takes records, on the rank that writes."""

    def last_step(self) -> int:
        """The last step that an earlier session left here, -1 if there was none."""
        return -1

    def begin(self, session: Session) -> None:
        """Called once before the first record."""
        return None

    @abstractmethod
    def __call__(self, record: Record, /) -> None:
        """Takes a record."""

    def close(self, step: int, counts: Mapping[str, int]) -> None:
        """The end.

        Args:
            step: The last step.
            counts: What happened since the last record, as in ``Record.counts``.
        """
        return None


class Function(Sink):
    """Hands records to a function."""

    def __init__(self, function: Callable[[Record], object]) -> None:
        self._function = function

    def __call__(self, record: Record, /) -> None:
        self._function(record)


class JsonLines(Sink):
    """Appends to a file, one JSON object per line: what reports are made of.

    Each line is handed to the operating system at once, so a process that is killed loses nothing
    that it has written, and breaks one line at most. A later process goes on behind it.

    Args:
        path: The file; folders are made as needed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._broken = False

    def last_step(self) -> int:
        """The last step in the file, -1 if there is none."""
        last = -1
        for line in read_lines(self.path)[0] if self.path.is_file() else ():
            if line["kind"] in ("step", "end"):
                last = int(line["step"])
            elif line["kind"] == "session":  # it took back what came later
                last = min(last, int(line["step"]) - 1)
        return last

    def begin(self, session: Session) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file() and self.path.stat().st_size:
            with self.path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                self._broken = file.read(1) != b"\n"
        self._append("session", {"version": VERSION, "jddist": __version__, **asdict(session)})

    def __call__(self, record: Record, /) -> None:
        self._append("step", record.as_json())

    def close(self, step: int, counts: Mapping[str, int]) -> None:
        self._append("end", {"step": step, "counts": dict(counts)})

    def _append(self, kind: str, values: Mapping[str, Any]) -> None:
        line = json.dumps({"kind": kind, **values}, allow_nan=False) + "\n"
        content = (("\n" if self._broken else "") + line).encode()
        self._broken = True  # until all of it is written
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            written = os.write(file, content)
        finally:
            os.close(file)
        if written != len(content):
            raise OSError(f"Only {written} of {len(content)} bytes could be written to {self.path}")
        self._broken = False


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects in a file of JSON lines, and the number of lines that are damaged."""
    found: list[dict[str, Any]] = []
    damaged = 0
    for line in _lines(path):
        try:
            values = json.loads(line)
        except ValueError:
            damaged += 1
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int) and "kind" in values:
            found.append(values)
        else:
            damaged += 1
    return found, damaged


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield line


class TensorBoard(Sink):
    """Writes every number as a scalar for TensorBoard, and the cosines as a histogram.

    Args:
        directory: The folder of the event files.

    Raises:
        ImportError: The package tensorboard is missing.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import HistogramProto, Summary
        except ImportError as error:
            raise ImportError(
                "Found no tensorboard, which this sink writes with; expected it to be installed. "
                'Run: pip install "jddist[monitoring]"'
            ) from error
        self._make = SummaryWriter
        self._summary, self._histogram = Summary, HistogramProto
        self._directory = directory
        self._writer: Any = None

    def begin(self, session: Session) -> None:
        # What an earlier session wrote from this step on is hidden.
        purge = session.step if session.step > 0 else None
        self._writer = self._make(str(self._directory), purge_step=purge)

    def __call__(self, record: Record, /) -> None:
        if self._writer is None:
            raise RuntimeError("Found no open event file; expected one. Call begin first.")
        value = self._summary.Value
        values = [value(tag=name, simple_value=v) for name, v in record.scalars().items()]
        for group in record.groups:
            if isinstance(group.cosines, Spread) and group.cosines.histogram is not None:
                tag = f"groups/{group.name}/cosines" if group.name else "cosines"
                values.append(value(tag=tag, histo=self._histogram_of(group.cosines)))
        # One event for all of them: SummaryWriter.add_scalar makes one each, ten times as slow.
        self._writer.file_writer.add_summary(
            self._summary(value=values), record.step, walltime=record.time
        )

    def _histogram_of(self, cosines: Spread) -> Any:
        counts = cosines.histogram
        assert counts is not None
        edges = np.linspace(-1.0, 1.0, len(counts) + 1)
        centres = (edges[1:] + edges[:-1]) / 2
        return self._histogram(
            min=float(cosines.quantiles[0]),
            max=float(cosines.quantiles[-1]),
            num=int(counts.sum()),
            sum=float(counts @ centres),
            sum_squares=float(counts @ centres**2),
            bucket_limit=edges[1:].tolist(),
            bucket=counts.tolist(),
        )

    def close(self, step: int, counts: Mapping[str, int]) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
