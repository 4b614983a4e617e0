"""Blocks of rows against autograd: a random combination of the rows must be the gradient it gives.

One vector-Jacobian product finds whatever would otherwise be silently wrong: rows attributed to the
wrong samples, contributions that no recorded call accounts for, a rule that does not fit its layer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from jddist.distribution.lockstep import Lockstep, part_like

from .blocks import JacobianBlock
from .differentiate import weighted_gradients
from .layout import OutputLayout
from .parameters import Entry

# How many rows are compared one by one where a sum over all of them is too inexact.
_SINGLE_ROWS = 3
# How many elements are compared at a time.
_PIECE = 1 << 16


def wrong_entries(
    output: Tensor,
    layout: OutputLayout,
    entries: Sequence[Entry],
    leaves: Sequence[Tensor],
    blocks: Sequence[JacobianBlock | None],
    eps: float,
    lockstep: Lockstep,
) -> frozenset[int] | None:
    """The indices of those entries whose blocks do not combine to autograd's gradient.

    Args:
        output: The objectives, with their graph, which is kept.
        layout: The layout of ``output``.
        entries: The parameters to check.
        leaves: The tensors that stand for them in the graph.
        blocks: The blocks of all parameters.
        eps: A machine epsilon coarser than that of the parameters, if something ran with it.
        lockstep: The ranks that check their parts of the same rows, and have to find the same.

    Returns:
        Indices, or None if the gradient is not finite and nothing can be said.
    """
    if not entries:
        return frozenset()
    draw = draw_weights(output, layout)
    wrong = _disagreeing(output, layout, entries, leaves, blocks, draw, eps, lockstep)
    if not wrong or layout.num_rows < 2:
        return wrong
    # Some of torch's kernels add a narrow parameter's gradient up in its own dtype: LayerNorm's
    # bias in bf16 is 20 % off over 2,048 terms. A single row has few enough of them.
    narrow = {
        entry.index: leaf
        for entry, leaf in zip(entries, leaves, strict=True)
        if entry.index in wrong and leaf.dtype.itemsize < 4
    }
    if not narrow:
        return wrong
    suspects = [entry for entry in entries if entry.index in narrow]
    confirmed: frozenset[int] = frozenset()
    for row in draw.abs().argsort(descending=True)[:_SINGLE_ROWS].tolist():
        alone = torch.zeros_like(draw)
        alone[row] = 1
        found = _disagreeing(
            output, layout, suspects, list(narrow.values()), blocks, alone, eps, lockstep
        )
        confirmed |= found or frozenset()
    return (wrong - narrow.keys()) | confirmed


def _disagreeing(
    output: Tensor,
    layout: OutputLayout,
    entries: Sequence[Entry],
    leaves: Sequence[Tensor],
    blocks: Sequence[JacobianBlock | None],
    weights: Tensor,
    eps: float,
    lockstep: Lockstep,
) -> frozenset[int] | None:
    """``wrong_entries`` for one combination of the rows."""
    expected = Expected(output, layout, entries, leaves, weights, eps)
    finite = expected.is_finite
    wrong = [finite and not expected.agrees(e.index, blocks[e.index]) for e in entries]
    if lockstep.active:
        some_infinite, *wrong = lockstep.union([not finite, *wrong])
        finite = not some_infinite
    if not finite:
        return None
    return frozenset(e.index for e, is_wrong in zip(entries, wrong, strict=True) if is_wrong)


def check_alike(
    output: Tensor,
    layout: OutputLayout,
    entries: Sequence[Entry],
    blocks: Sequence[JacobianBlock | None],
    eps: float,
    lockstep: Lockstep,
) -> None:
    """Raises LayoutMismatchError unless ranks in lockstep have the same objectives, and the same
    rows of the parameters that all of them hold alike.

    Args:
        output: The objectives.
        layout: The layout of ``output``.
        entries: The parameters.
        blocks: The blocks of all parameters.
        eps: A machine epsilon coarser than that of the blocks, if something ran with it.
        lockstep: The ranks.
    """
    if lockstep.group.size == 1:
        return
    values = {"the objectives": layout.rows_of(output)}
    weights = torch.linspace(-1.0, 2.0, layout.num_rows, dtype=torch.float64).to(output.device)
    for entry in entries:
        block = blocks[entry.index]
        if block is None or lockstep.cuts(entry.parameter):
            continue
        eps = max(eps, torch.finfo(entry.parameter.dtype).eps)
        combined = block.combine(weights).reshape(-1)
        signs = torch.ones_like(combined)
        signs[::2] = -1.0
        values[f"the gradient of {entry.name}"] = torch.stack([combined @ signs, combined.norm()])
    eps = max(eps, torch.finfo(output.dtype).eps)
    lockstep.check_same(values, min(0.1, 30 * eps**0.5), min(0.01, 1e3 * eps))


class Expected:
    """The gradient of one combination of the rows, as autograd gives it.

    Args:
        output: The objectives, with their graph, which is kept.
        layout: The layout of ``output``.
        entries: The parameters.
        leaves: The tensors that stand for them in the graph.
        weights: The combination, [m]; ``draw_weights`` by default.
        eps: A machine epsilon coarser than that of the parameters, if something ran with it.

    Attributes:
        gradients: This rank's part of it, by the parameters' indices, as long as nobody asked.
        is_finite: Whether the gradient is; if not, nothing can be said.
    """

    def __init__(
        self,
        output: Tensor,
        layout: OutputLayout,
        entries: Sequence[Entry],
        leaves: Sequence[Tensor],
        weights: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        self._weights = draw_weights(output, layout) if weights is None else weights
        self._eps = eps
        whole = weighted_gradients(output, layout.shaped(self._weights), leaves) if entries else []
        found = [
            None if gradient is None else part_like(gradient, leaf)
            for gradient, leaf in zip(whole, leaves, strict=True)
        ]
        self._total = math.hypot(*(_norm(g) for g in found if g is not None))
        self.gradients = {e.index: g for e, g in zip(entries, found, strict=True)}
        self.is_finite = math.isfinite(self._total)

    @property
    def remaining(self) -> set[int]:
        """The parameters that nobody has asked for."""
        return set(self.gradients)

    def agrees(self, index: int, block: JacobianBlock | None) -> bool:
        """Whether a parameter's rows combine to its gradient, which is forgotten after that."""
        gradient = self.gradients.pop(index)
        with torch.no_grad():
            return _agree(block, self._weights, gradient, self._total, self._eps)


def draw_weights(output: Tensor, layout: OutputLayout) -> Tensor:
    """A random combination of the rows, the same each time: [m]."""
    generator = torch.Generator().manual_seed(layout.num_rows)
    draw = torch.randn(layout.num_rows, generator=generator, dtype=torch.float64)
    return draw.to(device=output.device, dtype=output.dtype)


def warn_direct(names: Sequence[str], *, had_calls: bool, in_parts: bool = False) -> None:
    """Says which parameters no usable call accounts for."""
    reason = "have no recorded call (create the Engine before the forward pass)"
    if had_calls:
        reason = (
            "are read without a batched call of their module that is still on record, or by a "
            "module that changes its buffers"
        )
        if in_parts:
            reason += ", or by a module without a closed form around tensor-parallel layers"
    warnings.warn(
        f"The parameters {', '.join(names)} {reason}: their rows are computed by one backward pass "
        "per objective, which is exact but slow.",
        stacklevel=2,
    )


def warn_wrong(names: Sequence[str]) -> None:
    """Says which parameters' blocks were found wrong."""
    warnings.warn(
        f"The rows of the parameters {', '.join(names)}, rebuilt from the recorded calls, do not "
        "add up to autograd's gradient: a module mixes the samples, its tensors do not have the "
        "samples first, or its parameters are also read without calling it. Their rows are "
        "computed by one backward pass per objective, which is exact but slow.",
        stacklevel=2,
    )


def _agree(
    block: JacobianBlock | None,
    weights: Tensor,
    expected: Tensor | None,
    total: float,
    eps: float,
) -> bool:
    """Whether the rows of ``block``, combined, are the ``expected`` gradient up to rounding.

    Rows attributed to wrong samples miss by the size of the gradient itself; rounding, also of
    half-precision activations, stays far below the bound. ``total`` is the norm of the gradient of
    all parameters: some gradients are zero but for rounding (the bias of attention keys).
    """
    if block is None and expected is None:
        return True
    zero = weights.new_zeros((), dtype=torch.float64)
    combined = zero if block is None else block.combine(weights)
    target = zero if expected is None else expected.reshape(-1)
    eps = max(eps, torch.finfo(weights.dtype if expected is None else expected.dtype).eps)
    difference = _distance(combined.reshape(-1), target)
    scale = _norm(combined) + _norm(target)
    return difference <= min(0.1, 30 * eps**0.5) * scale + min(0.01, 1e3 * eps) * total


def _distance(first: Tensor, second: Tensor) -> float:
    """The norm of the difference of two vectors (or numbers), added up in float64."""
    left, right = (_pieces(t) for t in torch.broadcast_tensors(first, second))
    squares = [_square(a.double() - b.double()) for a, b in zip(left, right, strict=True)]
    return math.sqrt(float(torch.stack(squares).sum()))


def _norm(tensor: Tensor) -> float:
    """The norm, added up in float64 without a copy of all elements in that dtype."""
    return math.sqrt(float(torch.stack([_square(p.double()) for p in _pieces(tensor)]).sum()))


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.reshape(-1).split(_PIECE)


def _square(piece: Tensor) -> Tensor:
    return torch.dot(piece, piece)
