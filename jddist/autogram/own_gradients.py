"""Whether what this rank gave to the reduction of gradients was finite: after it, none can tell.

A sum over ranks spreads NaN to all of them, and with the next step it is in every objective. Each
rank therefore notes what it sends, one number per parameter that nothing waits for; they are read
only once there is an error, to name the rank from which it came.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from jddist._progress import progress
from jddist.distribution.cut import part_of

# Gradients may accumulate over some steps before an optimizer takes them.
_KEPT = 16

Note = Callable[[str, Tensor], None]


class OwnGradients:
    """Notes of the last backwards of this rank."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, list[tuple[str, Tensor | float]]]] = deque(maxlen=_KEPT)
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, _remove, self._handles)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnGradients:
        return OwnGradients()

    def begin(self) -> Note:
        """A backward begins; the function takes a name and a gradient, for each parameter."""
        noted: list[tuple[str, Tensor | float]] = []
        self._steps.append((progress.step, noted))

        def note(name: str, gradient: Tensor) -> None:
            noted.append((name, _total(gradient)))

        return note

    def watch(self, leaves: Mapping[str, Tensor]) -> None:
        """Notes what the next backward finds for these leaves of the graph, until ``release``."""
        self.release()
        note = self.begin()
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                self._handles.append(leaf.register_hook(OwnHook(name, note)))

    def release(self) -> None:
        """Ends ``watch``."""
        _remove(self._handles)

    def found(self) -> tuple[int, list[str]] | None:
        """The first step in which a gradient was not finite, and of which parameters; or None."""
        for step, noted in self._steps:
            bad = [name for name, total in noted if not math.isfinite(total)]
            if bad:
                return step, bad
        return None


class OwnHook:
    """What ``OwnGradients`` hangs on a leaf. It changes nothing, so no backward is run for it."""

    def __init__(self, name: str, note: Note) -> None:
        self._name, self._note = name, note

    def __call__(self, gradient: Tensor | None) -> None:
        if gradient is not None:  # None: a custom backward on the way here found nothing.
            self._note(self._name, gradient)


class Noting(Sequence[Tensor | None]):
    """The same gradients, each noted when it is asked for.

    Args:
        gradients: This rank's.
        names: Of their parameters.
        note: Takes name and gradient.
    """

    def __init__(
        self, gradients: Sequence[Tensor | None], names: Sequence[str], note: Note
    ) -> None:
        self._gradients, self._names, self._note = gradients, names, note

    def __len__(self) -> int:
        return len(self._gradients)

    @overload
    def __getitem__(self, index: int) -> Tensor | None: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor | None]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor | None] | None:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        gradient = self._gradients[index]
        if gradient is not None:
            self._note(self._names[index], gradient)
        return gradient

    def __iter__(self) -> Iterator[Tensor | None]:
        return (self[i] for i in range(len(self)))


def _total(gradient: Tensor) -> Tensor | float:
    """A number that is not finite if any entry is not; of a device, still to be waited for."""
    local = part_of(gradient.detach())
    if local.layout is torch.sparse_coo:
        local = local._values()
    narrow = local.dtype in (torch.float16, torch.bfloat16)
    total = local.sum(dtype=torch.float32 if narrow else None)
    return total.item() if total.device.type == "cpu" else total


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
