"""Half of a symmetric matrix as a vector, and back."""

from __future__ import annotations

import pytest
import torch

from jddist.distribution.triangle import pack_lower, unpack_symmetric


@pytest.mark.parametrize("m", range(9))
def test_every_element_of_the_lower_triangle_travels_once(m: int) -> None:
    matrix = torch.arange(1.0, m * m + 1).view(m, m)
    packed = pack_lower(matrix)
    assert sorted(packed.tolist()) == sorted(matrix.tril()[matrix.tril() > 0].tolist())
    assert len(packed) == m * (m + 1) // 2
    assert torch.equal(unpack_symmetric(packed, m), matrix.tril() + matrix.tril(-1).T)


def test_what_stands_above_the_diagonal_does_not_count() -> None:
    matrix = torch.full((4, 4), float("nan")).triu(1) + torch.ones(4, 4).tril()
    assert not pack_lower(matrix.nan_to_num(7.0)).eq(7.0).any()
