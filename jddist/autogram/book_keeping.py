"""The weighted gradient without a second backward: sum_i w_i J_i from the blocks of rows.

What the Gramian was made of holds the gradient too: for a Linear, (w * G)^T A, as in Differentially
Private Optimization on Large Model at Small Cost (arXiv:2210.00038). Nothing but ``.grad`` may
depend on the backward that is left out: no parameter outside of the engine, no hook.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from jddist.distribution.base import Distribution

from .global_pass import GlobalLayout
from .local_pass import Blocks
from .own_gradients import OwnHook
from .parameters import Entry

_GLOBAL_HOOKS = ("_global_backward_hooks", "_global_backward_pre_hooks")


class Books(IntEnum):
    """How this rank gets its weighted gradient."""

    NO = 0
    """By a backward of the whole graph, with all that it brings along."""
    GRADIENTS = 1
    """From the graph; only the engine's parameters want one."""
    ROWS = 2
    """From the rows; only the engine's parameters want one."""


def agreed(told: Sequence[Sequence[int]], own: Books) -> Books:
    """What this rank does, given that all ranks have to run their wrappers' backward or none.

    Args:
        told: For each rank, its Books and whether it has freed its graph.
        own: This rank's.

    Raises:
        RuntimeError: A rank needs a backward of its whole graph, and another has freed its own.
    """
    if all(books != Books.NO for books, _ in told):
        return own
    freed = [rank for rank, (_, gone) in enumerate(told) if gone]
    if freed:
        whole = next(rank for rank, (books, _) in enumerate(told) if books == Books.NO)
        raise RuntimeError(
            f"Found graphs of different kinds: that of rank {whole} leads to tensors outside of "
            f"the engine or has hooks, that of rank {freed[0]} does not; expected the same kind "
            "on every rank. Call engine.backward(..., retain_graph=True)."
        )
    return Books.NO


def no_hooks(entries: Iterable[Entry], modules: Iterable[nn.Module]) -> bool:
    """Whether no hook waits for the backward of these parameters and modules."""
    for entry in entries:
        hooks: Mapping[int, object] = entry.parameter._backward_hooks or {}
        if not all(isinstance(hook, OwnHook) for hook in hooks.values()):
            return False
        if getattr(entry.parameter, "_post_accumulate_grad_hooks", None):
            return False
    if any(getattr(module_globals, name, None) for name in _GLOBAL_HOOKS):
        return False
    return not any(m._backward_hooks or m._backward_pre_hooks for m in modules)


def combined(
    layout: GlobalLayout, blocks: Blocks, entries: Sequence[Entry], weights: Tensor
) -> Sequence[Tensor | None]:
    """The gradient of each entry from this rank's rows, or None.

    Each is computed when it is asked for, which can be done once: so that some may be under way to
    other ranks while others are computed, and so that the memory of the rows serves the next ones.

    Args:
        layout: The layout of the objectives.
        blocks: This rank's blocks.
        entries: The parameters.
        weights: Weights of this rank's objectives, as for its backward.
    """
    return _Combined(blocks, entries, layout.local.rows_of(weights))


class _Combined(Sequence[Tensor | None]):
    def __init__(self, blocks: Blocks, entries: Sequence[Entry], weights: Tensor) -> None:
        self._blocks, self._entries, self._weights = blocks, entries, weights
        self._asked_for: set[int] = set()

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Tensor | None: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor | None]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor | None] | None:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        entry = self._entries[index]
        assert entry.index not in self._asked_for, "the rows are gone after the first time"
        self._asked_for.add(entry.index)
        block = self._blocks[entry.index]
        if block is None:
            return None
        with torch.no_grad():
            gradient = block.combine(self._weights).view_as(entry.parameter)
        block.forget()
        return gradient


def differentiated(
    distribution: Distribution,
    output: Tensor,
    entries: Sequence[Entry],
    weights: Tensor,
    *,
    retain_graph: bool,
) -> list[Tensor | None]:
    """The gradient of each entry from the graph."""
    parameters = [e.parameter for e in entries]
    with distribution.first_pass():
        found = torch.autograd.grad(
            output, parameters, weights, retain_graph=retain_graph, allow_unused=True
        )
    # Autograd may hand out one tensor, or views of one, for several parameters.
    counts = Counter(g.untyped_storage()._cdata for g in found if g is not None)
    return [
        g.clone() if g is not None and counts[g.untyped_storage()._cdata] > 1 else g for g in found
    ]
