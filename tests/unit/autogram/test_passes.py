"""How many passes several objectives take: one for all where that is faster, else one each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from jddist.autogram import Engine, differentiate
from tests._oracle import gramian, relative_error

TASKS = 5


@pytest.mark.parametrize(
    ("limit", "passes"),
    # The widest activation is [6, 48] in float64: 2304 bytes.
    [(2304, [TASKS]), (2303, [1] * TASKS)],
    ids=["together", "each"],
)
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_passes(
    batch_dim: int | None, limit: int, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 48), nn.Tanh(), nn.Linear(48, TASKS)).double()
    engine = Engine(model, batch_dim=batch_dim)
    losses = model(torch.randn(6, 8, dtype=torch.float64)).square()
    losses = losses if batch_dim == 0 else losses.mean(0)
    expected = gramian(losses, model.parameters())
    seen: list[int] = []
    grad = torch.autograd.grad

    def counted(outputs: Any, inputs: Any, grads: torch.Tensor, **options: Any) -> Any:
        seen.append(len(grads) if options.get("is_grads_batched") else 1)
        return grad(outputs, inputs, grads, **options)

    monkeypatch.setattr(differentiate, "_WIDEST_BATCHED", {"cpu": limit})
    monkeypatch.setattr(torch.autograd, "grad", counted)
    for _ in range(3):  # the third one is not followed by a check
        seen.clear()
        found = engine.compute_gramian(losses)
    assert seen == passes
    assert relative_error(found, expected) <= 1e-12
