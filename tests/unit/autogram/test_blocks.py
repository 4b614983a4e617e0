"""Blocks of rows by themselves: their forms agree with the rows written out, and memory returns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jddist.autogram.blocks import (
    ColumnOrder,
    DenseBlock,
    JacobianBlock,
    LookupBlock,
    OuterBlock,
    Patches,
    Scratch,
    TotalBlock,
    Window,
    sum_blocks,
)
from tests._oracle import relative_error

B, K, OUT, IN = 3, 2, 5, 4


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def outer(t: int) -> tuple[OuterBlock, Tensor]:
    a, g = _randn(B, t, IN), _randn(B, K, t, OUT)
    return OuterBlock(a, g), torch.einsum("bkto,bti->bkoi", g, a).reshape(B * K, -1)


def lookup(n: int) -> tuple[LookupBlock, Tensor]:
    samples, lines, values = torch.randint(B, (n,)), torch.randint(OUT, (n,)), _randn(n, K, IN)
    rows = torch.zeros(B, K, OUT, IN, dtype=torch.float64)
    for i, v, value in zip(samples, lines, values, strict=True):
        rows[i, :, v] += value
    return LookupBlock(samples, lines, values, B, OUT), rows.reshape(B * K, -1)


def dense() -> tuple[DenseBlock, Tensor]:
    rows = _randn(B * K, OUT * IN)
    return DenseBlock(rows), rows


def joined(*pairs: tuple[JacobianBlock, Tensor]) -> tuple[JacobianBlock, Tensor]:
    return sum_blocks([b for b, _ in pairs]), torch.stack([rows for _, rows in pairs]).sum(0)


MADE: dict[str, Callable[[], tuple[JacobianBlock, Tensor]]] = {
    "pairs": lambda: outer(1),
    "rows": lambda: outer(40),
    "two calls": lambda: joined(outer(1), outer(2)),
    "lookup": lambda: lookup(7),
    "lookup as rows": lambda: lookup(60),
    "nothing read": lambda: lookup(0),
    "dense": dense,
    "tied": lambda: joined(lookup(6), outer(3)),
    "tied twice": lambda: joined(outer(3), lookup(6), outer(2), lookup(3)),
    "anything": lambda: joined(outer(3), dense(), lookup(4)),
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("budget", [0, 6912, 1 << 20])
@pytest.mark.parametrize("name", MADE)
def test_a_block_is_its_rows(name: str, budget: int, keep: bool) -> None:
    torch.manual_seed(0)
    block, rows = MADE[name]()
    scratch = Scratch(budget)
    block.lend(scratch, keep=keep)
    weights = _randn(B * K)
    # 1e-12: sums of a few products in another order.
    for _ in range(2):  # before and after rows may be held
        assert relative_error(block.combine(weights), weights @ rows) <= 1e-12
        assert relative_error(block.gramian(), rows @ rows.T) <= 1e-12
        assert relative_error(block.rows(), rows) <= 1e-12
    assert torch.equal(block.gramian(), block.gramian().T)
    other, other_rows = MADE["two calls"]()
    assert relative_error(block.cross(other), rows @ other_rows.T) <= 1e-12
    block.release()
    assert scratch._held == 0


@pytest.mark.parametrize("one", MADE)
@pytest.mark.parametrize("two", MADE)
def test_products_between_blocks(one: str, two: str) -> None:
    torch.manual_seed(0)
    (left, left_rows), (right, right_rows) = MADE[one](), MADE[two]()
    assert relative_error(left.cross(right), left_rows @ right_rows.T) <= 1e-12


def test_a_tied_table_stays_in_tiles() -> None:
    assert isinstance(joined(lookup(6), outer(3))[0], TotalBlock)


def test_held_memory_is_used_again_and_limited() -> None:
    scratch, cpu = Scratch(budget=1000), torch.device("cpu")
    first = scratch.hold((10, 5), torch.float64, cpu)  # 400 of the 500 bytes that may be held
    assert first is not None
    assert scratch.hold((10, 5), torch.float64, cpu) is None
    scratch.give_back(first)
    again = scratch.hold((5, 10), torch.float64, cpu)
    assert again is not None and again.data_ptr() == first.data_ptr()
    scratch.give_back(again)
    other = scratch.hold((60,), torch.float64, cpu)  # of another size: the first one goes
    assert other is not None
    scratch.give_back(other)
    assert len(scratch._free) == 1


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("budget", [0, 6912, 1 << 20])
@pytest.mark.parametrize("k", [1, 2])
def test_products_with_others_while_the_own_are_made(k: int, budget: int, keep: bool) -> None:
    """``add_gramian_and_crosses`` against the rows themselves, in one tile and in many."""
    torch.manual_seed(0)

    def block(b: int, t: int, ones: bool, dtype: torch.dtype) -> OuterBlock:
        a = torch.randn(b, t, 4, dtype=dtype)
        return OuterBlock(a, torch.randn(b, k, t, 7, dtype=dtype), ones=ones)

    mine = block(5, 9, False, torch.float64)
    others = [block(3, 2, True, torch.float64), block(6, 4, False, torch.float32)]
    rows = [b.rows()[:, : 7 * 4].double() for b in (mine, *others)]
    scratch = Scratch(budget)
    for one in (mine, *others):
        one.lend(scratch, keep=keep and one is mine)
    total = torch.zeros(5 * k, 5 * k, dtype=torch.float64)
    crosses = [torch.ones(5 * k, o.num_rows, dtype=torch.float64) for o in others]
    mine.add_gramian_and_crosses(total, others, crosses)
    assert relative_error(total.tril(), (rows[0] @ rows[0].T).tril()) <= 1e-12
    for cross, theirs, bound in zip(crosses, rows[1:], (1e-12, 1e-6), strict=True):
        assert relative_error(cross - 1, rows[0] @ theirs.T) <= bound
    weights = torch.randn(5 * k, dtype=torch.float64)
    assert relative_error(mine.combine(weights), rows[0].T @ weights) <= 1e-12


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("batch", [5, 67])
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_rows_by_convolutions(channels: int, batch: int, calls: int) -> None:
    """They are those by patches in float64, held or not."""
    torch.manual_seed(0)
    window = Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    fast: list[JacobianBlock] = []
    plain: list[JacobianBlock] = []
    for _ in range(calls):
        images, grads = torch.randn(batch, 1, channels, 6, 7), torch.randn(batch, 1, 42, 37)
        fast.append(OuterBlock(Patches(images, window, convolves=True), grads))
        slow = Patches(images.double(), window)
        order = ColumnOrder((37, 9, channels), (0, 2, 1))
        plain.append(OuterBlock(slow, grads.double(), order=order))
    block, rows = sum_blocks(fast), sum_blocks(plain).rows()
    other = torch.randn(4, 37, channels * 9)
    others = [OuterBlock(torch.eye(channels * 9).expand(4, -1, -1), other.mT[:, None])]
    scratch, weights = Scratch(), torch.rand(batch)
    block.lend(scratch, keep=True)
    assert isinstance(block, OuterBlock)
    # 1e-6: sums of up to 84 products in float32, relative to the largest.
    for _ in range(2):  # before and after rows are held
        assert relative_error(block.combine(weights), weights.double() @ rows) <= 1e-6
        assert relative_error(block.gramian(), rows @ rows.T) <= 1e-6
        assert relative_error(block.rows(), rows) <= 1e-6
    assert block._kept is not None
    total = torch.zeros(batch, batch, dtype=torch.float64)
    crosses = [torch.zeros(batch, 4, dtype=torch.float64)]
    block.add_gramian_and_crosses(total, others, crosses)
    assert relative_error(total.tril(), (rows @ rows.T).tril()) <= 1e-6
    assert relative_error(crosses[0], rows @ other.flatten(1).double().T) <= 1e-6
    block.release()
    assert scratch._held == 0
