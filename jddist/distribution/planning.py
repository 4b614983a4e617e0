"""What travels between ranks to get the Gramian, and what each rank computes. No group is needed.

``plan`` chooses a scheme for every layer from the shapes alone, so it answers for any number of
ranks on any machine. Bytes are those sent per rank by the ring convention: what leaves the rank in
an all-to-all, (W - 1)/W of the input of a reduce-scatter, 2 (W - 1)/W of the buffer of an
all-reduce; padding counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .schemes import Batches, BlockShape, Scheme, Step, candidates, rows_step, summed_step

Prefer = Literal["bytes", "time"]

FLOPS_PER_BYTE = 100.0
"""The default of ``flops_per_byte``: 1 GB/s between ranks of 100 GFLOP/s each."""

# Numbers in one message: small parameters share a collective.
_BUCKET_ELEMENTS = 1 << 22
# The Gramian is added up in float64.
_GRAMIAN_BYTES = 8


@dataclass(frozen=True, eq=False)
class Plan:
    """The exchange of all layers, in the order of its collectives.

    Attributes:
        steps: One for each layer, or for several small parameters that travel together.
        size: The number of ranks W.
        num_rows: The number of objectives of all ranks m.
        itemsize: Bytes of a number that travels.
        flag_numbers: How many numbers beside it share the all-reduce of the Gramian.
        everyone: The number of ranks that add up the Gramian, if there are more than W: each of
            them has some of the columns (tensor parallelism).
    """

    steps: tuple[Step, ...]
    size: int
    num_rows: int
    itemsize: int
    flag_numbers: int
    everyone: int = 0

    @property
    def gramian_bytes(self) -> float:
        """What each rank sends, once for the whole model, to add up the halves of the Gramian."""
        numbers = self.num_rows * (self.num_rows + 1) // 2 + self.flag_numbers
        size = max(self.size, self.everyone)
        return 2 * (size - 1) / size * numbers * _GRAMIAN_BYTES

    @property
    def bytes_sent(self) -> Tensor:
        """What each rank sends in all: [W]."""
        return self._sum("elements") * self.itemsize + self.gramian_bytes

    @property
    def flops(self) -> Tensor:
        """What each rank computes for the Gramian, from the factors on: [W]."""
        return self._sum("flops")

    def _sum(self, name: str) -> Tensor:
        total = torch.zeros(self.size, dtype=torch.float64)
        for step in self.steps:
            total += getattr(step, name)
        return total

    def __str__(self) -> str:
        """A table with one line per step, for the busiest rank."""
        lines = ["parameters  scheme    bytes sent       FLOPs"]
        for step in self.steps:
            first, last = step.parameters[0], step.parameters[-1]
            name = f"{first}" if first == last else f"{first} to {last}"
            sent, flops = float(step.elements.max()) * self.itemsize, float(step.flops.max())
            lines.append(f"{name:<10}  {step.scheme.value:<8}  {sent:10.3g}  {flops:10.3g}")
        lines.append(f"{'Gramian':<10}  {'sum':<8}  {self.gramian_bytes:10.3g}")
        sent, flops = float(self.bytes_sent.max()), float(self.flops.max())
        lines.append(f"{'all':<10}  {'':<8}  {sent:10.3g}  {flops:10.3g}")
        return "\n".join(lines)


def plan(
    shapes: Sequence[Sequence[BlockShape]],
    columns: Sequence[int],
    batches: Sequence[int],
    objectives: int = 1,
    *,
    itemsize: int = 4,
    prefer: Prefer = "bytes",
    flops_per_byte: float = FLOPS_PER_BYTE,
) -> Plan:
    """Plans the exchange of ranks that have objectives of their own (``Shard(0)``).

    It is a function of its arguments alone: every rank makes the same plan, and nothing is sent to
    make it. ``[shapes_of_one_rank] * W`` describes W equal ranks.

    Args:
        shapes: For each rank, what it has for each parameter, in the model's order.
        columns: The number of elements of each parameter.
        batches: For each rank, its number of samples b; zero for a rank without any.
        objectives: The number of objectives of each sample k.
        itemsize: Bytes of a number that travels.
        prefer: "bytes" takes for each layer the scheme that sends the least, on average over the
            ranks; "time" the one with the least ``flops_per_byte * bytes + FLOPs`` on the busiest
            rank. Ties go to the fewer FLOPs. The plan reports both numbers in either case.
        flops_per_byte: How many floating-point operations a rank does in the time in which it
            sends one byte. For "time" only.

    Returns:
        The plan.

    Raises:
        ValueError: The arguments do not fit one another, or ``prefer`` is neither.
    """
    _check(shapes, columns, batches, prefer)
    ranks = Batches.of(shapes, batches, objectives)

    def cost(step: Step) -> tuple[float, float]:
        busiest = float(step.flops.max())
        if prefer == "bytes":
            return float(step.elements.sum()), busiest
        sent = step.elements * itemsize * flops_per_byte
        return float((sent + step.flops).max()), busiest

    def best(parameters: tuple[int, ...]) -> Step:
        turn = 0 if sent_in_turn[0] <= sent_in_turn[1] else 1
        return min(candidates(ranks, parameters, columns, turn), key=cost)

    steps: list[Step] = []
    bucket: list[int] = []
    # Half of the ranks send for one rank more than the others do; then it is the others' turn.
    sent_in_turn = [0.0, 0.0]

    def flush() -> None:
        if bucket:
            steps.append(rows_step(ranks, tuple(bucket), columns))
            bucket.clear()

    index = 0
    while index < len(columns):
        chosen = [best((index,))]
        if _fusable(ranks, index):
            apart = [chosen[0], best((index + 1,))]
            both = best((index, index + 1))
            costs = [sum(cost(step)[i] for step in apart) for i in range(2)]
            chosen = [both] if cost(both) <= (costs[0], costs[1]) else apart
        for step in chosen:
            index += len(step.parameters)
            if step.scheme is not Scheme.ROWS:
                steps.append(step)
                if step.lengths is not None:
                    sent_in_turn[step.turn] += float(step.lengths.sum())
                continue
            width = sum(columns[i] for i in bucket) + step.num_columns
            if width * ranks.num_rows > _BUCKET_ELEMENTS:
                flush()
            bucket.extend(step.parameters)
    flush()
    rows = ranks.num_rows
    return Plan(tuple(steps), len(batches), rows, itemsize, flag_numbers=rows)


def plan_sums(
    parameters: Sequence[int],
    columns: Sequence[int],
    num_rows: int,
    size: int,
    *,
    itemsize: int = 4,
) -> Plan:
    """Plans the exchange of ranks that have estimates of the same objectives (``Partial``).

    There is one way: the rows are added up into column shards.

    Args:
        parameters: Indices of the parameters that any rank has rows for.
        columns: The number of elements of each parameter.
        num_rows: The number of objectives.
        size: The number of ranks.
        itemsize: Bytes of a number that travels.
    """
    steps: list[Step] = []
    bucket: list[int] = []
    for index in parameters:
        together = sum(columns[i] for i in bucket) + columns[index]
        if bucket and together * num_rows > _BUCKET_ELEMENTS:
            steps.append(summed_step(tuple(bucket), columns, num_rows, size))
            bucket = []
        bucket.append(index)
    if bucket:
        steps.append(summed_step(tuple(bucket), columns, num_rows, size))
    return Plan(tuple(steps), size, num_rows, itemsize, flag_numbers=size * num_rows)


def check_prefer(prefer: str) -> None:
    """Raises ValueError unless it is "bytes" or "time"."""
    if prefer not in ("bytes", "time"):
        raise ValueError(f"Found prefer={prefer!r}; expected 'bytes' or 'time'.")


def _check(
    shapes: Sequence[Sequence[BlockShape]],
    columns: Sequence[int],
    batches: Sequence[int],
    prefer: str,
) -> None:
    check_prefer(prefer)
    if len(shapes) != len(batches) or not batches:
        raise ValueError(
            f"Found shapes of {len(shapes)} ranks and batches of {len(batches)}; expected the same "
            "number, at least one. Repeat one rank's shapes for ranks that are alike."
        )
    lengths = {len(of_rank) for of_rank in shapes}
    if lengths != {len(columns)}:
        raise ValueError(
            f"Found {', '.join(map(str, sorted(lengths)))} shapes per rank and {len(columns)} "
            "numbers of columns; expected one of each for every parameter."
        )
    if min(batches) < 0:
        raise ValueError(f"Found a batch of {min(batches)} samples; expected none or more.")


def _fusable(ranks: Batches, index: int) -> bool:
    """Whether, on every rank that has rows, the next parameter is this one's bias."""
    if index + 1 >= ranks.num_parameters:
        return False
    any_rows = False
    for weight, bias in zip(ranks.shapes_of(index), ranks.shapes_of(index + 1), strict=True):
        if weight.kind == "none" and bias.kind == "none":
            continue
        if weight.kind != "outer" or bias.kind != "outer" or not bias.shares_grads:
            return False
        if weight.in_features == 0 or bias.in_features != 0:
            return False
        any_rows = True
    return any_rows
