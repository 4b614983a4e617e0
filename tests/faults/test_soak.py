"""Some seconds of ``tests.faults.soak``, and that it would notice a leak."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests._ranks import run_ranks
from tests.faults.soak import growth, steps_for, too_much

_leak: list[torch.Tensor] = []


def _leaking(
    rank: int, world_size: int, seconds: float, samples: int, folder: str
) -> list[dict[str, int]]:
    hold = torch.Tensor.square

    def square(tensor: torch.Tensor) -> torch.Tensor:
        found = hold(tensor)
        _leak.append(found.detach())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "square", square)
        return steps_for(rank, world_size, seconds, samples, folder)


def test_nothing_grows_in_some_seconds(tmp_path: Path) -> None:
    for samples in run_ranks(steps_for, 2, 6.0, 12, str(tmp_path), timeout=120):
        assert not too_much(samples), f"{growth(samples)}: {samples}"


def test_a_leak_would_be_noticed(tmp_path: Path) -> None:
    for samples in run_ranks(_leaking, 1, 1.0, 6, str(tmp_path), timeout=120):
        assert {"tensors", "tensor_bytes"} <= too_much(samples).keys()
