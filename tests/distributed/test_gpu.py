"""The same answers on a GPU: one process, and one rank over NCCL. Skipped without one."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
import torch.distributed as dist

from jddist.aggregation import UPGradWeighting
from jddist.autogram import Engine
from tests._oracle import jacobian, relative_error
from tests.distributed._training import LOSSES, flatten, make_data, make_network, wrap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BOUND = 1e-10  # float64 on the GPU rounds as on the CPU


def _check(model: torch.nn.Module, inner: torch.nn.Module) -> None:
    x, y = (t.cuda() for t in make_data())
    engine = Engine(model, batch_dim=0)
    for _ in range(2):
        inner.zero_grad()
        losses = LOSSES["instance"](model(x), y)
        rows = jacobian(losses, inner.parameters())
        gramian = engine.compute_gramian(losses)
        weights = engine.compute_weights(gramian, UPGradWeighting())
        losses.backward(engine.local_weights(weights))
        assert relative_error(gramian, rows @ rows.T) <= BOUND
        grads = flatten([p.grad for p in inner.parameters()])
        assert relative_error(grads, weights @ rows) <= BOUND


def test_one_process() -> None:
    model = make_network().cuda()
    _check(model, model)


def test_one_rank_over_nccl() -> None:
    with tempfile.TemporaryDirectory() as folder:
        method = f"file://{os.path.join(folder, 'rendezvous')}"
        dist.init_process_group("nccl", init_method=method, rank=0, world_size=1)
        try:
            model = make_network().cuda()
            _check(wrap(model), model)
        finally:
            dist.destroy_process_group()
