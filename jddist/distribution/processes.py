"""Whether a process runs, as far as it can be seen from here: on the same machine (Linux)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NamedTuple


class Identity(NamedTuple):
    """A process among all of all machines.

    Attributes:
        machine: The machine's boot and its namespace of process numbers; empty if unknown.
        pid: The number of the process.
        started: When it started, in ticks since the boot: numbers are used again.
    """

    machine: str
    pid: int
    started: int

    @staticmethod
    def own() -> Identity:
        """This process."""
        found = _state(os.getpid())
        return Identity(_machine(), os.getpid(), 0 if found is None else found[1])

    def look(self) -> Literal["runs", "stopped", "dead", "unknown"]:
        """What the process does; "unknown" if it is on another machine."""
        if not self.machine or self.machine != _machine():
            return "unknown"
        found = _state(self.pid)
        if found is None or found[1] != self.started or found[0] in "ZXx":
            return "dead"
        return "stopped" if found[0] in "Tt" else "runs"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _state(pid: int) -> tuple[str, int] | None:
    """The letter of a process' state and its start; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # its name, before, may hold anything
    return fields[0], int(fields[19])
