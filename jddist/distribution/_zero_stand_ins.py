"""What stands in for some methods of a DeepSpeed engine while jddist is attached to it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

_METHODS = ("backward", "step", "zero_grad")


class Keeper(Protocol):
    """What keeps gradients until the step."""

    def hand_over(self) -> None: ...
    def drop_waiting(self) -> None: ...
    def note_scalar_backward(self) -> None: ...


class StandIns:
    """Methods in the place of an engine's; the engine owns this object.

    Args:
        engine: The engine.
        keeper: What keeps gradients until the step.

    Attributes:
        takes_losses: What is called with the arguments of ``engine.backward`` if the first of them
            is a tensor of more than one dimension; None: the engine itself.
        original: The engine's own methods, by name.
    """

    def __init__(self, engine: Any, keeper: Keeper) -> None:
        self._engine = weakref.ref(engine)
        self._keeper = keeper
        self._before = {n: engine.__dict__[n] for n in _METHODS if n in engine.__dict__}
        self.takes_losses: Callable[..., Any] | None = None
        self.original: dict[str, Callable[..., Any]] = {n: getattr(engine, n) for n in _METHODS}
        for name in _METHODS:
            engine.__dict__[name] = getattr(self, f"_{name}")

    def restore(self) -> None:
        """Puts the engine's own methods back."""
        engine = self._engine()
        if engine is None:
            return
        for name in _METHODS:
            if engine.__dict__.get(name) == getattr(self, f"_{name}"):
                del engine.__dict__[name]
                if name in self._before:
                    engine.__dict__[name] = self._before[name]

    def _backward(self, loss: Any, *args: Any, **options: Any) -> Any:
        if self.takes_losses is not None and isinstance(loss, Tensor) and loss.ndim > 0:
            return self.takes_losses(loss, *args, **options)
        self._keeper.note_scalar_backward()
        return self.original["backward"](loss, *args, **options)

    def _step(self, *args: Any, **options: Any) -> Any:
        self._keeper.hand_over()
        return self.original["step"](*args, **options)

    def _zero_grad(self, *args: Any, **options: Any) -> Any:
        self._keeper.drop_waiting()
        return self.original["zero_grad"](*args, **options)
