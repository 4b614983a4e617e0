"""The Gramian of several parameters, a weight together with its bias where that is cheaper."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import JacobianBlock
from .outer import OuterBlock


def add_blocks(total: Tensor, blocks: Sequence[JacobianBlock | None]) -> None:
    """Adds the products of each block's rows to ``total`` [m, m]; only the lower triangle counts.

    Args:
        total: The Gramian so far, float64 and contiguous.
        blocks: Blocks in the parameters' order; None where the rows are all zero.
    """
    index = 0
    while index < len(blocks):
        block, after = blocks[index], blocks[index + 1] if index + 1 < len(blocks) else None
        index += 1
        if block is None:
            continue
        if _is_weight_with_bias(block, after):
            assert isinstance(block, OuterBlock)
            if block.prefers_pairs():  # then the bias is nearly free
                block = block.with_bias()
                index += 1
        block.add_gramian(total)


def _is_weight_with_bias(block: JacobianBlock | None, after: JacobianBlock | None) -> bool:
    """Whether two blocks are the weight and the bias of one layer, with the same gradients."""
    return (
        isinstance(block, OuterBlock)
        and isinstance(after, OuterBlock)
        and block.in_features > 0
        and after.in_features == 0
        and after.shares_grads(block)
    )
