"""Phases of a save or load: what fails on one rank fails, with one message, on all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from jddist.distribution.collectives import Group, timeout_of
from jddist.errors import CheckpointError


class Ranks:
    """The ranks that write and read together, over a gloo group of their own.

    Args:
        process_group: Whose ranks; None for all that run, or for this process alone.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.process_group: dist.ProcessGroup | None = None
        if dist.is_available() and dist.is_initialized():
            parent = dist.group.WORLD if process_group is None else process_group
            assert parent is not None
            # Of its own: a save in the background must not meet the training's collectives.
            self.process_group = dist.new_group(
                dist.get_process_group_ranks(parent),
                backend="gloo",
                timeout=timeout_of(parent),
                use_local_synchronization=True,
            )
        self._group = Group(self.process_group)
        self.rank, self.size = self._group.rank, self._group.size

    def run(self, doing: str, work: Callable[[], Any]) -> list[Any]:
        """Runs ``work`` on every rank, and gathers what it returns: JSON values.

        Raises:
            CheckpointError: It raised on some rank; the same on every rank.
        """
        value, failure = None, None
        try:
            value = work()
        except Exception as error:  # raised again on every rank, below
            failure = error
        message = "" if failure is None else f"{type(failure).__name__}: {failure}"
        payload = json.dumps([message, value]).encode()
        lengths = self._group.gather_header(torch.tensor([len(payload)])).flatten().tolist()
        found = [json.loads(p) for p in self._group.gather_payloads(payload, lengths)]
        failed = {rank: text for rank, (text, _) in enumerate(found) if text}
        if failed:
            listed = "; ".join(f"rank {rank}: {text}" for rank, text in failed.items())
            raise CheckpointError(f"{doing} failed on {listed}") from failure
        return [value for _, value in found]

    def run_on_first(self, doing: str, work: Callable[[], Any]) -> Any:
        """Runs ``work`` on rank 0 alone; every rank gets what it returns."""
        return self.run(doing, lambda: work() if self.rank == 0 else None)[0]
