"""The scheme FACTORS: what every pair of ranks needs of each other, sent once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from jddist.autogram.blocks import JacobianBlock, LookupBlock, OuterBlock, add_blocks

from .collectives import Group
from .schemes import Step, partners_of, receivers_of


class Products:
    """The products that this rank computes of the layers that are exchanged as factors.

    Args:
        group: The ranks.
        counts: The number of rows of each rank.
        device: The device of the rows.

    Attributes:
        square: This rank's rows with one another [m, m], float64; the lower triangle counts.
    """

    def __init__(self, group: Group, counts: Sequence[int], device: torch.device) -> None:
        self._group, self._counts, self._device = group, list(counts), device
        self.square = self._zeros([group.rank])
        self._crosses: dict[tuple[int, ...], Tensor] = {}

    def cross(self, others: Sequence[int]) -> Tensor:
        """This rank's rows with those of some others, side by side: [m, m'], float64."""
        key = tuple(others)
        if key not in self._crosses:
            self._crosses[key] = self._zeros(others)
        return self._crosses[key]

    def add_to(self, total: Tensor) -> None:
        """Adds all of them to the lower triangle of the Gramian of all ranks' rows [M, M], once."""
        ends = list(accumulate(self._counts))
        places = [slice(end - count, end) for end, count in zip(ends, self._counts, strict=True)]
        own = places[self._group.rank]
        total[own, own] += self.square
        for others, products in self._crosses.items():
            widths = [self._counts[r] for r in others]
            for r, product in zip(others, products.split(widths, dim=1), strict=True):
                if r < self._group.rank:
                    total[own, places[r]] += product
                else:
                    total[places[r], own] += product.T
        for buffer in (self.square, *self._crosses.values()):
            self._group.buffers.give_back(buffer)
        self._crosses.clear()

    def _zeros(self, others: Sequence[int]) -> Tensor:
        shape = (self._counts[self._group.rank], sum(self._counts[r] for r in others))
        buffer = self._group.buffers.take(prod(shape), torch.float64, self._device)
        return buffer.view(shape).zero_()


def start_factors(
    products: Products,
    mine: Sequence[JacobianBlock | None],
    step: Step,
    group: Group,
    batches: Sequence[int],
    k: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[], None]:
    """Sends this rank's factors to the ranks that multiply with them.

    Args:
        products: What is computed so far.
        mine: This rank's block, and that of the bias if the step has one.
        step: The plan for this block.
        group: The ranks.
        batches: b of each rank.
        k: The number of objectives of each sample.
        dtype: The dtype in which the factors travel.
        device: The device of the rows.

    Returns:
        A function that waits for the others' factors and adds to ``products`` those of this rank's
        rows with one another and with its partners'.
    """
    assert step.lengths is not None and step.positions is not None
    lengths = [int(n) for n in step.lengths.tolist()]
    positions = [int(t) for t in step.positions.tolist()]
    rank, size = group.rank, group.size
    weight = mine[0]
    receivers, partners = (f(rank, size, step.turn) for f in (receivers_of, partners_of))
    received = [n if r in partners else 0 for r, n in enumerate(lengths)]
    flat = group.buffers.take(lengths[rank] if receivers else 0, dtype, device)
    if len(flat):
        assert weight is not None
        _flatten(flat, weight, positions[rank])
    sent = [flat if r in receivers else flat[:0] for r in range(size)]
    wait = group.exchange(sent, received)

    def multiply() -> Tensor:
        present = weight is not None and lengths[rank] > 0
        alike = _alike(partners, positions, lengths, step.kind) if present else []
        by_rows = bool(alike) and _prefers_rows(weight)
        left: JacobianBlock | None = None
        if weight is not None and alike and not by_rows:
            # Before the rows are kept, and the factors forgotten.
            left = _as_one(weight, flat, step, batches[rank], positions[rank], k, dtype)
        if present and not by_rows:  # nothing of the others' is needed
            add_blocks(products.square, mine)
        arrived = wait()
        if weight is None or not alike:
            return arrived
        gathered = arrived.split(received)
        rights = [
            _block_of(
                [_Factors.of(gathered[r], step, batches[r], positions[r], k) for r in others], step
            )
            for others in alike
        ]
        for right in rights:
            right.lend(weight.scratch, keep=False)
        crosses = [products.cross(others) for others in alike]
        if left is None:
            _add_by_rows(products.square, crosses, mine, rights)
            return arrived
        for right, cross in zip(rights, crosses, strict=True):
            cross += left.cross(right)
        return arrived

    def finish() -> None:
        arrived = multiply()
        for buffer in (flat, arrived):
            group.buffers.give_back(buffer)

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


def _prefers_rows(block: JacobianBlock | None) -> bool:
    """Whether the products of a block's rows are made of the rows themselves."""
    if not isinstance(block, OuterBlock) or not block.in_features:
        return False
    return not block.prefers_pairs()


def _add_by_rows(
    square: Tensor,
    crosses: Sequence[Tensor],
    mine: Sequence[JacobianBlock | None],
    rights: Sequence[JacobianBlock],
) -> None:
    """Adds the products of this rank's rows with one another and with each of ``rights``, this
    rank's rows being formed once."""
    weight, *biases = mine
    others = [right for right in rights if isinstance(right, OuterBlock)]
    assert isinstance(weight, OuterBlock)
    weight.add_gramian_and_crosses(square, others, crosses)
    for bias in biases:
        assert isinstance(bias, OuterBlock)
        bias.add_gramian(square)
        for other, cross in zip(others, crosses, strict=True):
            theirs = other.bias_rows()
            cross += bias.bias_rows().to(theirs.dtype) @ theirs.T


def _as_one(
    block: JacobianBlock,
    flat: Tensor,
    step: Step,
    batch: int,
    positions: int,
    k: int,
    dtype: torch.dtype,
) -> JacobianBlock:
    """This rank's block as the others would see it: with its bias, if the step has one.

    Args:
        block: The block.
        flat: Its factors as they were sent; empty if they were not.
        step: The plan for it.
        batch: This rank's b.
        positions: Its t.
        k: The number of objectives of each sample.
        dtype: The dtype in which factors travel.
    """
    if isinstance(block, LookupBlock):
        return block
    assert isinstance(block, OuterBlock)
    if len(flat):
        found = _block_of([_Factors.of(flat, step, batch, positions, k)], step)
    else:
        inputs, grads = block.factors()
        inputs = None if inputs is None else inputs.to(dtype)
        found = OuterBlock(inputs, grads.to(dtype), ones=step.ones)
    found.lend(block.scratch, keep=False)
    return found


def rounded_up(count: int) -> int:
    """At most an eighth more: the number of entries changes with every batch, and what changes has
    to be told to the other ranks anew."""
    granule = 1 << max(0, count.bit_length() - 4)
    return -(-count // granule) * granule


def _flatten(flat: Tensor, block: JacobianBlock, positions: int) -> None:
    """Fills ``flat`` with a block's factors."""
    if isinstance(block, LookupBlock):
        samples, lines, values = block.entries()
        # Whole numbers travel as they are, in the bits of floating-point ones.
        numbers = flat[: 2 * positions].view(_integers_like(flat.dtype))
        # What is missing is filled with zeros for line 0.
        missing = positions - len(block)
        pieces = [F.pad(x, (0, missing)) for x in (samples, lines)]
        numbers.copy_(torch.cat(pieces))
        rest = flat[2 * positions :].view(positions, -1)
        rest[: len(block)] = values.flatten(1)
        rest[len(block) :] = 0
        return
    assert isinstance(block, OuterBlock)
    inputs, grads = block.factors()
    split = 0
    if inputs is not None:
        split = inputs.numel()
        flat[:split].view(inputs.shape).copy_(inputs)
    flat[split:].view(grads.shape).copy_(grads)


def _integers_like(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype.itemsize == 8 else torch.int32
