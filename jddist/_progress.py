"""Where this process is: the step and its stage, noted as the calls go by.

Stages of a step: *forward* is all up to the handshake of the next call, the user's own code above
all; *handshake*, *exchange*, *weighting* (on rank 0), *broadcast* (of the weights), and *backward*
until gradients are written, which ends the step. Nothing here communicates; who wants to know of
changes registers.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

STAGES = ("forward", "handshake", "exchange", "weighting", "broadcast", "backward", "checkpoint")

# Whether code runs inside of a backward: activation checkpoints call modules again there.
_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def inside_backward() -> bool:
    """Whether autograd calls: an activation checkpoint runs forwards there."""
    return _graph_task() != -1


class Progress:
    """The step and stage of this process.

    Attributes:
        step: How many steps were finished, since the start or that of a loaded checkpoint.
        stage: One of ``STAGES``.
        since: When it was entered, in seconds of ``time.time``.
        listener: Called after every change.
    """

    def __init__(self) -> None:
        self.step = 0
        self.stage = STAGES[0]
        self.since = time.time()
        self.listener: Callable[[], None] | None = None

    def enter(self, stage: str) -> None:
        """Notes that a stage begins."""
        if stage == self.stage:
            return
        if self.stage == "backward":
            self.step += 1
        self.stage = stage
        self.since = time.time()
        if self.listener is not None:
            self.listener()

    def enter_forward(self) -> None:
        """Notes that a module was called, which ends a backward of the user's own."""
        if self.stage != "forward" and not inside_backward():
            self.enter("forward")


progress = Progress()
enter = progress.enter
