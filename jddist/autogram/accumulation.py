"""Several batches of objectives that join one Gramian, as if they were further ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import Placement

from jddist.distribution.base import is_average, is_sharded

from .blocks import DenseBlock, JacobianBlock, StackedBlock
from .layout import OutputLayout
from .local_pass import Blocks


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What a rank knows of one batch.

    Attributes:
        output: Its objectives, with their graph.
        layout: The layout of the output.
        blocks: Its blocks of rows.
        count: Samples per objective in the engine's order of rows, if given.
        samples: The batch size that the modules saw.
    """

    output: Tensor
    layout: OutputLayout
    blocks: Blocks
    count: list[float] | None
    samples: int


@dataclass(frozen=True, eq=False)
class Joined:
    """Several batches as one.

    Attributes:
        output: The objectives of all batches, or this rank's estimate from all of them.
        layout: The layout of the output.
        blocks: The blocks of its rows.
        count: Samples per objective, for estimates of means.
        samples: The batch size that the modules saw in all.
    """

    output: Tensor
    layout: OutputLayout
    blocks: Blocks
    count: list[float] | None
    samples: int
    _batches: Sequence[MicroBatch] = field(repr=False)
    _shares: Sequence[Tensor] | None = field(repr=False)

    @staticmethod
    def of(batches: Sequence[MicroBatch], placement: Placement) -> Joined:
        """Joins at least one batch.

        Raises:
            ValueError: The batches have objectives of different kinds.
        """
        one = batches[0]
        samples = sum(batch.samples for batch in batches)
        _check_alike(batches, placement)
        if is_sharded(placement):
            output = torch.cat([b.output.detach() for b in batches], dim=one.layout.sharded_dim)
            counts = [batch.layout.num_rows for batch in batches]
            layout = OutputLayout.of(output, one.layout.batch_dim)
            blocks = stack_blocks([batch.blocks for batch in batches], counts)
            return Joined(output, layout, blocks, None, samples, batches, None)
        shares, count = _shares(batches, placement)
        output = sum_scaled([one.layout.rows_of(b.output.detach()) for b in batches], shares)
        blocks = _sum_blocks([batch.blocks for batch in batches], shares)
        output = one.layout.shaped(output)
        return Joined(output, one.layout, blocks, count, samples, batches, shares)

    @property
    def outputs(self) -> list[Tensor]:
        """The batches' objectives, with their graphs."""
        return [batch.output for batch in self._batches]

    def weights_of_batches(self, weights: Tensor) -> list[Tensor]:
        """Weights of this rank's objectives -> weights for each batch's backward."""
        if self._shares is None:
            dim = self.layout.sharded_dim
            return list(weights.split([b.layout.size for b in self._batches], dim=dim))
        rows = self.layout.rows_of(weights)
        return [self.layout.shaped(rows * share.to(rows)) for share in self._shares]


class Accumulation:
    """The batches of one ``engine.accumulate()``.

    Attributes:
        weights: The weights of all objectives, once the context has ended.
        scale: By what a GradScaler multiplied all outputs, if one did.
    """

    def __init__(self) -> None:
        self.weights: Tensor | None = None
        self.scale: float | None = None
        self._weighting: Callable[[Tensor], Tensor] | None = None
        self._batches: list[MicroBatch] = []

    def add(
        self,
        batch: MicroBatch,
        weighting: Callable[[Tensor], Tensor] | Tensor,
        scale: float | None,
    ) -> None:
        """Takes a batch. Raises ValueError unless all come with the same weighting."""
        if isinstance(weighting, Tensor):
            raise ValueError(
                "Found weights within engine.accumulate(); expected a weighting: the weights "
                "follow from all batches together."
            )
        if self._batches and weighting is not self._weighting:
            raise ValueError(
                "Found different weightings within engine.accumulate(); expected the same object "
                "for all batches, since it runs once. Create it before the context."
            )
        if self._batches and scale != self.scale:
            raise ValueError(
                f"Found batches scaled by {self.scale} and {scale} within engine.accumulate(); "
                "expected one scale. Update the GradScaler after the context."
            )
        self._weighting, self.scale = weighting, scale
        self._batches.append(batch)

    @property
    def weighting(self) -> Callable[[Tensor], Tensor]:
        """What weighs the objectives of all batches."""
        assert self._weighting is not None
        return self._weighting

    def joined(self, placement: Placement) -> Joined:
        """All batches as one. Raises ValueError if there are none, or different ones."""
        if not self._batches:
            raise ValueError(
                "Found no batch in engine.accumulate(); expected at least one on every rank. A "
                "rank without samples passes losses[:0] of any dummy sample."
            )
        return Joined.of(self._batches, placement)


def stack_blocks(batches: Sequence[Blocks], counts: Sequence[int]) -> Blocks:
    """For each parameter the rows of all batches, one after the other."""
    return [
        StackedBlock(parts, counts) if any(part is not None for part in parts) else None
        for parts in zip(*batches, strict=True)
    ]


def sum_scaled(rows: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """Σ scale * rows, where what is scaled by zero may be NaN."""
    total = torch.zeros_like(rows[0])
    for part, scale in zip(rows, scales, strict=True):
        scale = scale.to(part).view(-1, *[1] * (part.ndim - 1))
        total += torch.where(scale == 0, 0.0, part * scale)
    return total


def _sum_blocks(batches: Sequence[Blocks], scales: Sequence[Tensor]) -> Blocks:
    blocks: list[JacobianBlock | None] = []
    for parts in zip(*batches, strict=True):
        present = [(p.rows(), s) for p, s in zip(parts, scales, strict=True) if p is not None]
        if not present:
            blocks.append(None)
            continue
        blocks.append(DenseBlock(sum_scaled(*zip(*present, strict=True))))
    return blocks


def _shares(
    batches: Sequence[MicroBatch], placement: Placement
) -> tuple[list[Tensor], list[float] | None]:
    """By what each batch's rows are scaled before they are added, and this rank's samples."""
    m = batches[0].layout.num_rows
    if not is_average(placement):
        return [torch.ones(m, dtype=torch.float64) for _ in batches], None
    known = [[1.0] * m if b.count is None else b.count for b in batches]
    counts = torch.tensor(known, dtype=torch.float64)
    total = counts.sum(dim=0)
    # A rank with more batches weighs more, with counts or without.
    return list(counts / total.masked_fill(total == 0, 1.0)), total.tolist()


def _check_alike(batches: Sequence[MicroBatch], placement: Placement) -> None:
    def kind(batch: MicroBatch) -> object:
        shape: list[int | str] = list(batch.layout.shape)
        if is_sharded(placement) and shape:
            shape[batch.layout.sharded_dim] = "*"
        return shape, batch.count is None

    kinds = [kind(batch) for batch in batches]
    if any(k != kinds[0] for k in kinds):
        shapes = [tuple(batch.layout.shape) for batch in batches]
        raise ValueError(
            f"Found batches of shapes {shapes}, with and without count; expected the same "
            "objectives in all of them. Only the number of samples may differ."
        )
    if is_sharded(placement) and not batches[0].layout.shape and len(batches) > 1:
        raise ValueError(
            "Found scalar outputs with objectives=Shard(0); expected a dimension along which the "
            "batches' objectives are concatenated. Use output.unsqueeze(0)."
        )
