"""Reads what a recorder has written, also while it writes and after it was killed."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .record import Record, Session
from .sinks import FILE_NAME, VERSION, read_lines


@dataclass(frozen=True, eq=False)
class Run:
    """A run: all its records, in the order of steps.

    Attributes:
        path: The file.
        sessions: The processes that wrote it, one after the other.
        records: The records. Those that a later session took back are left out.
        counts: The sums of all ``Record.counts``.
        damaged: The number of lines that could not be read, such as one that was being written
            when its process was killed.
    """

    path: Path
    sessions: list[Session] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    damaged: int = 0

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Run:
        """Reads a run.

        Args:
            path: The folder that was given to the recorder, or the file in it.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It was written by a later version.
        """
        file = Path(path)
        if file.is_dir():
            file /= FILE_NAME
        if not file.is_file():
            raise FileNotFoundError(
                f"Found no {file}; expected the records of a run. Pass the folder that was given "
                "to jddist.monitoring.Recorder."
            )
        lines, damaged = read_lines(file)
        sessions: list[Session] = []
        records: list[Record] = []
        ends: list[tuple[int, Counter[str]]] = []
        names: tuple[str, ...] | None = None
        for line in lines:
            kind, step = line["kind"], line["step"]
            try:
                if kind == "session":
                    _check_version(line.get("version"), file)
                    sessions.append(_session(line))
                    names = sessions[-1].names
                    records = [r for r in records if r.step < step]
                    ends = [e for e in ends if e[0] < step]
                elif kind == "step":
                    records.append(Record.from_json(line, names))
                elif kind == "end":
                    ends.append((step, Counter(line["counts"])))
            except (KeyError, TypeError, AttributeError):
                damaged += 1
        counts: Counter[str] = Counter()
        for part in [*(r.counts for r in records), *(counted for _, counted in ends)]:
            counts.update(part)
        return Run(file, sessions, records, counts, damaged)

    @property
    def alike(self) -> list[Record]:
        """The records with the same objectives as the last one: what can be drawn together."""
        return [r for r in self.records if _kind(r) == _kind(self.records[-1])]


def _kind(record: Record) -> object:
    each = None if record.per_sample else record.groups[0].objectives if record.groups else 0
    return record.per_sample, each, [g.name for g in record.groups], record.names


def _session(line: dict[str, object]) -> Session:
    names = line.get("names")
    known = {k: v for k, v in line.items() if k in Session.__dataclass_fields__}
    known["names"] = None if names is None else tuple(names)  # type: ignore[arg-type]
    return Session(**known)  # type: ignore[arg-type]


def _check_version(version: object, path: Path) -> None:
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"Found records of version {version} in {path}; expected {VERSION} or less. Read them "
            "with the version of jddist that wrote them, or a later one."
        )
