"""The weighted gradient without a second backward: sum_i w_i J_i from the blocks of rows.

What the Gramian was made of holds the gradient too: for a Linear, (w * G)^T A, as in Differentially
Private Optimization on Large Model at Small Cost (arXiv:2210.00038). Nothing but ``.grad`` may
depend on the backward that is left out: no parameter outside of the engine, no hook.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import IntEnum

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from jddist.distribution.base import Distribution

from .global_pass import GlobalLayout
from .local_pass import Blocks
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
        parameter = entry.parameter
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return False
    if any(getattr(module_globals, name, None) for name in _GLOBAL_HOOKS):
        return False
    return not any(m._backward_hooks or m._backward_pre_hooks for m in modules)


def combined(
    layout: GlobalLayout, blocks: Blocks, entries: Sequence[Entry], weights: Tensor
) -> list[Tensor | None]:
    """The gradient of each entry from this rank's rows, or None. The blocks lose their contents.

    Args:
        layout: The layout of the objectives.
        blocks: This rank's blocks.
        entries: The parameters.
        weights: Weights of this rank's objectives, as for its backward.
    """
    of_rows = layout.local.rows_of(weights)
    gradients: list[Tensor | None] = []
    with torch.no_grad():
        for entry in entries:
            block = blocks[entry.index]
            gradient = None if block is None else block.combine(of_rows)
            gradients.append(None if gradient is None else gradient.view_as(entry.parameter))
            if block is not None:
                block.forget()  # its memory may serve the next gradients
    return gradients


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
