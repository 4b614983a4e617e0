"""What the engine's tests share: a small model, its data, and the check against the oracle."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from jddist.autogram import Engine
from tests._oracle import gramian, relative_error

# A pattern for warnings.filterwarnings too, which matches from the start.
SLOW_WAY = r"(?s).*one backward pass per objective"


class Offset(nn.Module):
    """A module without a rule, for the generic fallback."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.offset).sin() * self.offset


def small_model(seed: int = 0) -> nn.Sequential:
    """6 -> 3 features, float64: layers with a rule and one without."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Offset(5), nn.Linear(5, 3)).double()


def data(size: int = 4, features: int = 6, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, features, generator=generator, dtype=torch.float64)


def losses_of(output: Tensor) -> Tensor:
    """[b, features] -> [b]."""
    return output.square().mean(1) + output.sin().sum(1)


def assert_exact(engine: Engine, losses: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """The engine's Gramian is the oracle's; returns it."""
    found = engine.compute_gramian(losses)
    # 1e-10: float64 rounding (1e-16) through a few layers, with a million to spare.
    assert relative_error(found, gramian(losses, parameters)) <= 1e-10
    return found


@contextmanager
def slow_way(announced: bool) -> Iterator[None]:
    """Fails unless the slow way is announced exactly if expected; other warnings are errors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(w.message) for w in caught]
    others = [text for text in texts if not re.match(SLOW_WAY, text)]
    assert not others, others
    assert bool(texts) == announced, texts or "the slow way was not announced"
