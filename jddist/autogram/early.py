"""The Gramian of one process, added up while the first pass still goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .assembly import Finished
from .blocks import JacobianBlock, Scratch, add_blocks

# Whether a parameter's block is what it should be.
Check = Callable[[int, JacobianBlock], bool]


class EarlyGramian:
    """Takes blocks of rows as they become known, so that nothing has to wait for the others.

    Args:
        num_rows: The number of objectives m.
        device: Where the rows are.
        scratch: The memory in which the blocks work.

    Attributes:
        total: The Gramian [m, m] of the blocks so far, float64; the lower triangle counts.
        counted: The parameters whose blocks are in it.
        keep: Whether the blocks are to give the weighted gradient too. If not, they lose their
            contents once they are counted.
    """

    def __init__(self, num_rows: int, device: torch.device, scratch: Scratch) -> None:
        self.total = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=device)
        self.counted: set[int] = set()
        self.keep = False
        self._scratch = scratch

    def add(self, finished: Finished) -> None:
        """Counts the blocks, which belong to one call."""
        for _, block in finished:
            block.lend(self._scratch, keep=self.keep)
        add_blocks(self.total, [block for _, block in finished])
        self.counted.update(index for index, _ in finished)
        if not self.keep:
            for _, block in finished:
                block.forget()

    def restart(self) -> None:
        """Forgets what was counted."""
        self.total.zero_()
        self.counted.clear()

    def complete(self, blocks: list[JacobianBlock | None]) -> Tensor:
        """The lower triangle of the Gramian of all ``blocks``, in the parameters' order."""
        rest = [None if i in self.counted else block for i, block in enumerate(blocks)]
        total, self.total = self.total, self.total.new_empty(0)  # it is large: keep it only once
        add_blocks(total, rest)
        return total
