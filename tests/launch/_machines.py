"""Two machines made of network namespaces on this one, each with its own address and interface."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class NotPermittedError(RuntimeError):
    """Namespaces cannot be made here (the message says why)."""


@dataclass(frozen=True)
class Machine:
    """A network namespace.

    Attributes:
        name: Of the namespace.
        address: By which the other one reaches it.
        interface: That has the address.
    """

    name: str
    address: str
    interface: str


def _ip(*arguments: str) -> None:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)
    if result.returncode != 0:
        raise NotPermittedError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")


@contextmanager
def two_machines() -> Iterator[list[Machine]]:
    """Makes them, joined by a cable, and removes them.

    Raises:
        NotPermittedError: Namespaces are not permitted here.
    """
    if shutil.which("ip") is None:
        raise NotPermittedError("there is no `ip`")
    number = os.getpid()
    # Of the addresses that are kept for tests of networks (RFC 2544); a subnet for each run.
    net = f"198.18.{number % 251}"
    machines = [Machine(f"jddist{number}-{i}", f"{net}.{i + 1}", f"jd{number}-{i}") for i in (0, 1)]
    made: list[Machine] = []
    try:
        for machine in machines:
            _ip("netns", "add", machine.name)
            made.append(machine)
        ends = [m.interface for m in machines]
        first, second = machines
        _ip("link", "add", ends[0], "netns", first.name, "type", "veth", "peer", "name", ends[1])
        _ip("link", "set", ends[1], "netns", second.name)
        for m in machines:
            _ip("-n", m.name, "address", "add", f"{m.address}/24", "dev", m.interface)
            _ip("-n", m.name, "link", "set", m.interface, "up")
            _ip("-n", m.name, "link", "set", "lo", "up")
        yield machines
    finally:
        for machine in made:
            subprocess.run(["ip", "netns", "delete", machine.name], capture_output=True, timeout=20)
