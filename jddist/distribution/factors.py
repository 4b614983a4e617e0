"""The scheme FACTORS: what every pair of ranks needs of each other, sent once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from jddist.autogram.blocks import JacobianBlock, LookupBlock, OuterBlock, add_blocks

from .collectives import Group
from .schemes import Step, partners_of, receivers_of


def start_factors(
    total: Tensor,
    mine: Sequence[JacobianBlock | None],
    step: Step,
    group: Group,
    batches: Sequence[int],
    k: int,
    dtype: torch.dtype,
) -> Callable[[], None]:
    """Sends this rank's factors to the ranks that multiply with them.

    Args:
        total: The Gramian of all ranks' rows [M, M], of which the lower triangle counts.
        mine: This rank's block, and that of the bias if the step has one.
        step: The plan for this block.
        group: The ranks.
        batches: b of each rank.
        k: The number of objectives of each sample.
        dtype: The dtype in which the factors travel.

    Returns:
        A function that waits for the others' factors and adds to ``total`` the products of this
        rank's rows with one another and with its partners'.
    """
    assert step.lengths is not None and step.positions is not None
    lengths = [int(n) for n in step.lengths.tolist()]
    positions = [int(t) for t in step.positions.tolist()]
    rank, size = group.rank, group.size
    block = mine[0]
    present = block is not None and lengths[rank] > 0
    flat = torch.zeros(lengths[rank], dtype=dtype, device=total.device)
    if block is not None and present and size > 1:
        flat = _flatten(block, dtype, positions[rank])
    receivers, partners = (f(rank, size, step.turn) for f in (receivers_of, partners_of))
    received = [n if r in partners else 0 for r, n in enumerate(lengths)]
    sent = [flat if r in receivers else flat[:0] for r in range(size)]
    wait = group.exchange(sent, received)

    def finish() -> None:
        gathered = wait().split(received)
        if block is None or not present:
            return
        starts = [k * sum(batches[:r]) for r in range(size + 1)]
        own = slice(starts[rank], starts[rank + 1])
        alike = _alike(partners, positions, lengths, step.kind)
        rights = [
            _block_of(
                [_Factors.of(gathered[r], step, batches[r], positions[r], k) for r in others], step
            )
            for others in alike
        ]
        for right in rights:
            right.lend(block.scratch, keep=False)
        square, crosses = _products(mine, rights, flat, step, batches[rank], positions[rank], k)
        total[own, own] += square
        for others, products in zip(alike, crosses, strict=True):
            widths = [k * batches[r] for r in others]
            for r, product in zip(others, products.split(widths, dim=1), strict=True):
                theirs = slice(starts[r], starts[r + 1])
                if r < rank:
                    total[own, theirs] += product
                else:
                    total[theirs, own] += product.T

    return finish


class _Factors:
    """One rank's factors, taken out of the vector in which they travelled."""

    def __init__(self, batch: int, first: Tensor | None, lines: Tensor | None, second: Tensor):
        self.batch, self.first, self.lines, self.second = batch, first, lines, second

    @staticmethod
    def of(flat: Tensor, step: Step, batch: int, positions: int, k: int) -> _Factors:
        """Samples, lines and values of a lookup block, or ``a`` and ``g`` of an outer one."""
        if step.kind == "lookup":
            numbers = flat[: 2 * positions].view(_integers_like(flat.dtype)).long()
            samples, lines = numbers.split(positions)
            values = flat[2 * positions :].view(positions, k, step.in_features)
            return _Factors(batch, samples, lines, values)
        split = batch * positions * step.in_features
        inputs = None
        if step.in_features:
            inputs = flat[:split].view(batch, positions, step.in_features)
        grads = flat[split:].view(batch, k, positions, step.out_features)
        return _Factors(batch, inputs, None, grads)


def _block_of(factors: Sequence[_Factors], step: Step) -> JacobianBlock:
    """One block of the rows of several ranks."""
    second = _joined([f.second for f in factors])
    first = [f.first for f in factors if f.first is not None]
    if step.kind == "lookup":
        starts = [sum(f.batch for f in factors[:i]) for i in range(len(factors))]
        samples = _joined([s + start for s, start in zip(first, starts, strict=True)])
        lines = _joined([f.lines for f in factors if f.lines is not None])
        batch = sum(f.batch for f in factors)
        return LookupBlock(samples, lines, second, batch, step.out_features)
    return OuterBlock(_joined(first) if first else None, second, ones=step.ones)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _alike(
    partners: Sequence[int], positions: Sequence[int], lengths: Sequence[int], kind: str
) -> list[list[int]]:
    """The partners that have rows, those together that fit into one block."""
    found: dict[int, list[int]] = {}
    for r in partners:
        if lengths[r] > 0:
            found.setdefault(0 if kind == "lookup" else positions[r], []).append(r)
    return list(found.values())


def _products(
    mine: Sequence[JacobianBlock | None],
    rights: Sequence[JacobianBlock],
    flat: Tensor,
    step: Step,
    batch: int,
    positions: int,
    k: int,
) -> tuple[Tensor, list[Tensor]]:
    """The products of this rank's rows with one another, in the lower triangle, and with those of
    each of ``rights``.

    Args:
        mine: This rank's block, and that of the bias if the step has one.
        rights: Other ranks' rows.
        flat: This rank's factors as they travelled.
        step: The plan for this block.
        batch: This rank's b.
        positions: Its t.
        k: The number of objectives of each sample.
    """
    weight, *biases = mine
    assert weight is not None
    m, device = weight.num_rows, weight.device
    square = torch.zeros(m, m, dtype=torch.float64, device=device)
    outer = isinstance(weight, OuterBlock) and weight.in_features > 0
    if isinstance(weight, OuterBlock) and outer and not weight.prefers_pairs():
        others = [right for right in rights if isinstance(right, OuterBlock)]
        crosses = [
            torch.zeros(m, other.num_rows, dtype=torch.float64, device=device) for other in others
        ]
        weight.add_gramian_and_crosses(square, others, crosses)
        for bias in biases:
            assert isinstance(bias, OuterBlock)
            bias.add_gramian(square)
            for other, cross in zip(others, crosses, strict=True):
                theirs = other.bias_rows()
                cross += bias.bias_rows().to(theirs.dtype) @ theirs.T
        return square, crosses
    add_blocks(square, mine)
    if not rights:
        return square, []
    left = _block_of([_Factors.of(flat, step, batch, positions, k)], step)
    left.lend(weight.scratch, keep=False)
    return square, [left.cross(right) for right in rights]


def rounded_up(count: int) -> int:
    """At most an eighth more: the number of entries changes with every batch, and what changes has
    to be told to the other ranks anew."""
    granule = 1 << max(0, count.bit_length() - 4)
    return -(-count // granule) * granule


def _flatten(block: JacobianBlock, dtype: torch.dtype, positions: int) -> Tensor:
    """A block's factors as one vector."""
    if isinstance(block, LookupBlock):
        samples, lines, values = block.entries()
        missing = positions - len(block)  # filled with zeros for line 0
        samples, lines = (F.pad(x, (0, missing)) for x in (samples, lines))
        values = F.pad(values, (0, 0, 0, 0, 0, missing))
        # Whole numbers travel as they are, in the bits of floating-point ones.
        bits = torch.cat([samples, lines]).to(_integers_like(dtype)).view(dtype)
        return torch.cat([bits, values.reshape(-1).to(dtype)])
    assert isinstance(block, OuterBlock)
    inputs, grads = block.factors()
    pieces = [grads.reshape(-1)] if inputs is None else [inputs.reshape(-1), grads.reshape(-1)]
    return torch.cat(pieces).to(dtype)


def _integers_like(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype.itemsize == 8 else torch.int32
