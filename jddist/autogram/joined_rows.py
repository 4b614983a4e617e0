"""Several batches of tasks whose rows are reduced as they come: only their sum is kept."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from jddist.errors import UnsupportedModelError

from .accumulation import sum_scaled
from .agreement import Agreed
from .blocks import DenseBlock
from .book_keeping import Books
from .local_pass import Blocks


class JoinedRows:
    """This rank's columns of the rows of all batches so far; of each row the mean over batches,
    weighed by their samples, or the sum."""

    def __init__(self) -> None:
        self.first: Agreed | None = None
        self.num_batches = 0
        self._rows: dict[int, Tensor] = {}
        self._samples = torch.zeros(0)
        self._finite: list[bool] = []
        self._losses = torch.zeros(0)

    def add(self, batch: Agreed, output: Tensor, average: bool) -> None:
        """Adds the rows of a batch that all ranks agreed on.

        Raises:
            UnsupportedModelError: The weighted gradient cannot come from the rows.
        """
        if batch.books is not Books.ROWS:
            raise UnsupportedModelError(
                "Found a graph that leads to tensors outside of the engine, or hooks on its "
                "modules, in engine.accumulate() of tasks with fully_shard; expected neither, "
                "since the gradients come from the rows alone. Take a step per micro-batch."
            )
        m = batch.layout.whole.num_rows
        samples = torch.ones(m, dtype=torch.float64)
        counts = [info["count"] for info in batch.infos]
        if average and None not in counts:
            samples = torch.tensor(counts, dtype=torch.float64).sum(dim=0)
        scale = torch.tensor(batch.layout.backward_scale, dtype=torch.float64)
        losses = batch.layout.local.rows_of(output.detach())
        assert batch.layout.rows_finite is not None
        finite = torch.tensor(batch.layout.rows_finite) & losses.isfinite().cpu()
        flags = (finite | (scale == 0)).tolist()
        if self.first is None:
            self.first = replace(batch, blocks=[None] * len(batch.blocks))
            self._samples = torch.zeros(m, dtype=torch.float64)
            self._finite, self._losses = [True] * m, torch.zeros_like(losses)
        for index, (block, other) in enumerate(zip(batch.blocks, batch.uncounted, strict=True)):
            block = other if block is None else block
            if block is not None:
                rows = sum_scaled([block.rows()], [samples])
                self._rows[index] = self._rows[index] + rows if index in self._rows else rows
        self._samples += samples
        self._finite = [a and b for a, b in zip(self._finite, flags, strict=True)]
        self._losses += sum_scaled([losses], [samples * scale])
        self.num_batches += 1

    def joined(self, average: bool) -> tuple[Agreed, Tensor]:
        """All batches as one that the ranks agreed on, and this rank's estimate of its objectives.

        Args:
            average: Whether the objectives are means over all samples; else sums.
        """
        assert self.first is not None
        scales = torch.ones_like(self._samples)
        if average:
            scales = self._samples.masked_fill(self._samples == 0, 1.0).reciprocal()
        blocks: Blocks = [None] * len(self.first.blocks)
        uncounted: Blocks = [None] * len(blocks)
        for index, rows in self._rows.items():
            counted = self.first.uncounted[index] is None
            block = DenseBlock(sum_scaled([rows], [scales]))
            (blocks if counted else uncounted)[index] = block
        ones = (1.0,) * len(self._samples)
        layout = replace(
            self.first.layout,
            row_scale=ones,
            backward_scale=ones,
            rows_finite=tuple(self._finite),
        )
        agreed = replace(self.first, layout=layout, blocks=blocks, uncounted=uncounted)
        return agreed, layout.local.shaped(sum_scaled([self._losses], [scales]))
