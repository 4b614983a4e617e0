"""Small versions of the benchmark's models, for tests of what they exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jddist.autogram import global_pass
from jddist.distribution import Scheme, planning
from jddist.distribution.schemes import Step
from tests.benchmark.models import Transformer, cnn, images, mlp, sentences, vectors

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (lambda: mlp(width=24, inputs=16), vectors(16)),
    "cnn": (lambda: cnn(width=2, size=8), images(8)),
    "transformer": (lambda: Transformer(8, blocks=1), sentences(4)),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().double()


def inputs(name: str, samples: int) -> Tensor:
    torch.manual_seed(1)
    x = MODELS[name][1](samples)
    # Few words, so that sentences share some.
    return x.double() if x.is_floating_point() else x % 5


@contextmanager
def only(scheme: Scheme | None) -> Iterator[None]:
    """Plans take ``scheme`` wherever it can serve; None leaves the choice to the planner."""
    original = planning.candidates

    def forced(*args: Any) -> list[Step]:
        found = original(*args)
        return [step for step in found if step.scheme is scheme] or found

    with pytest.MonkeyPatch.context() as monkeypatch:
        global_pass._plan.cache_clear()  # plans are remembered
        monkeypatch.setattr(planning, "candidates", forced)
        if scheme is Scheme.ROWS:  # a weight and its bias go as rows each for itself
            monkeypatch.setattr(planning, "_fusable", lambda *_: False)
        yield
    global_pass._plan.cache_clear()
