"""Lets the ranks meet before every forward of sharded modules, so that a failure finds them.

A forward gathers parameters, which is a matter of all ranks: one that raised beforehand would leave
the others waiting in messages of the wrapper's, where nothing can tell them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from jddist._progress import inside_backward


class Forwards:
    """Forwards of some modules, within ``met``.

    Args:
        modules: The modules whose forwards are a matter of all ranks.
        meet: Called before each outermost forward; what it raises ends the forward.
    """

    def __init__(self, modules: Iterable[nn.Module], meet: Callable[[], object]) -> None:
        self._modules = list(modules)
        self._meet = meet
        self._depth = 0

    @property
    def unfinished(self) -> bool:
        """Whether a forward has begun and not ended: it is under way, or it raised."""
        return self._depth > 0

    def reset(self) -> None:
        """Forgets a forward that did not end."""
        self._depth = 0

    @contextmanager
    def met(self) -> Iterator[None]:
        """Inside, the ranks meet."""
        handles: list[Any] = []
        for module in self._modules:
            # Before the wrapper's own hook, which gathers.
            handles.append(module.register_forward_pre_hook(self._begins, prepend=True))
            handles.append(module.register_forward_hook(self._ends))
        self.reset()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begins(self, *_: object) -> None:
        if inside_backward():  # an activation checkpoint
            return
        if self._depth == 0:
            self._meet()
        self._depth += 1

    def _ends(self, *_: object) -> None:
        if not inside_backward():
            self._depth = max(0, self._depth - 1)
