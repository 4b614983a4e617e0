"""Factors as one vector, and back."""

from __future__ import annotations

import pytest
import torch

from jddist.autogram.blocks import JacobianBlock, LookupBlock, OuterBlock
from jddist.distribution.factors import _block_of, _Factors, _flatten
from jddist.distribution.schemes import BlockShape, Scheme, Step


def _sent(
    block: JacobianBlock, shape: BlockShape, batch: int, k: int, numel: int, dtype: torch.dtype
) -> JacobianBlock:
    """What the others make of a block, whatever stood in the memory in which it is sent."""
    flat = torch.full((numel,), float("nan"), dtype=dtype)
    _flatten(flat, block, shape.positions)
    nothing = torch.zeros(1)
    step = Step(
        (0,),
        Scheme.FACTORS,
        (block.num_columns,),
        nothing,
        nothing,
        nothing,
        in_features=shape.in_features,
        out_features=shape.out_features,
        kind=shape.kind,
    )
    return _block_of([_Factors.of(flat, step, batch, shape.positions, k)], step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("missing", [0, 3])
def test_entries_of_a_table_travel_with_padding(missing: int, dtype: torch.dtype) -> None:
    samples, lines = torch.tensor([0, 1, 1, 2]), torch.tensor([3, 0, 3, 1])
    values = torch.randn(4, 2, 5, dtype=dtype)
    block = LookupBlock(samples, lines, values, 3, 7)
    shape = BlockShape("lookup", 4 + missing, 5, 7)
    found = _sent(block, shape, 3, 2, (4 + missing) * (2 + 2 * 5), dtype)
    assert torch.equal(found.rows(), block.rows())


def test_inputs_and_gradients_travel() -> None:
    inputs, grads = torch.randn(3, 4, 5), torch.randn(3, 2, 4, 6)
    block = OuterBlock(inputs, grads)
    shape = BlockShape("outer", 4, 5, 6)
    found = _sent(block, shape, 3, 2, inputs.numel() + grads.numel(), torch.float32)
    assert torch.equal(found.rows(), block.rows())
