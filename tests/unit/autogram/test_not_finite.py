"""Which objectives a Gramian that is not finite is blamed on."""

from __future__ import annotations

import pytest
import torch

from jddist.autogram.global_pass import _not_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_objective_that_is_not_finite_is_blamed_alone(value: float) -> None:
    gramian = torch.ones(4, 4, dtype=torch.float64)
    assert not _not_finite(gramian).any()
    gramian[2, :] = gramian[:, 2] = value
    assert _not_finite(gramian).tolist() == [False, False, True, False]


def test_both_are_blamed_for_a_product_that_an_exchange_broke() -> None:
    gramian = torch.ones(4, 4, dtype=torch.float64)
    gramian[1, 3] = gramian[3, 1] = float("nan")
    assert _not_finite(gramian).tolist() == [False, True, False, True]
