"""Memory that is used again."""

from __future__ import annotations

import pytest
import torch

from jddist.distribution.buffers import _IDLE, Buffers

CPU = torch.device("cpu")


def test_what_was_given_back_is_used_again() -> None:
    buffers = Buffers()
    first, second = (buffers.take(6, torch.float32, CPU) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    buffers.give_back(first.view(2, 3))
    assert buffers.take(6, torch.float64, CPU).dtype == torch.float64
    assert buffers.take(7, torch.float32, CPU).numel() == 7
    again = buffers.take(6, torch.float32, CPU)
    assert again.data_ptr() == first.data_ptr() and again.shape == (6,)
    assert buffers.take(6, torch.float32, CPU).data_ptr() != first.data_ptr()


def test_little_lies_idle() -> None:
    buffers = Buffers()
    buffers.give_back(torch.empty(3))
    for numel in (_IDLE // 16, _IDLE // 8, _IDLE // 16):
        buffers.give_back(torch.empty(numel, dtype=torch.float64))
    assert [free.numel() for free in buffers._free] == [_IDLE // 16]
    assert sum(free.nbytes for free in buffers._free) <= _IDLE


def test_nothing_is_given_back_twice() -> None:
    buffers = Buffers()
    buffer = buffers.take(5, torch.float32, CPU)
    buffers.give_back(buffer)
    with pytest.raises(AssertionError, match="twice"):
        buffers.give_back(buffer)
    for _ in range(2):
        buffers.give_back(buffers.take(0, torch.float32, CPU))
