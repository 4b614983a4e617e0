"""What every test starts from: one thread, a fixed seed, and properties searched reproducibly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# A shared machine makes single examples slow at random, and a red test must be red again tomorrow.
settings.register_profile("jddist", deadline=None, derandomize=True)
settings.load_profile("jddist")


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
