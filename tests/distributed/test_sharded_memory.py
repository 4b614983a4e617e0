"""No rank holds more of the rows than its columns, and none are copied to be aggregated.

``python -m tests.benchmark.sharded_memory`` measures resident memory, on a model of 200 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jddist import attach, grouping
from jddist.aggregation import (
    Aggregator,
    GradDrop,
    Mean,
    TrimmedMean,
    UPGrad,
    _graddrop,
    _trimmed_mean,
)
from jddist.autojac import backward, jac_to_grad, jac_to_grad_groups
from jddist.distribution.cut import _joined, adjacent_rows
from tests._ranks import run_ranks
from tests.distributed._sharded import make_mesh

LAYERS, WIDTH, TASKS = 8, 256, 4
SIZE = LAYERS * WIDTH**2 * 4  # bytes of all parameters

# They act on columns wherever these are; but those that remember some bring them in order.
BY_COLUMNS: dict[str, Callable[[], Aggregator]] = {
    "GradDrop": GradDrop,
    "TrimmedMean": lambda: TrimmedMean(1),
    "Mean": Mean,
}


class _Largest(TorchDispatchMode):
    """Remembers the largest storage that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if type(t) in (Tensor, nn.Parameter)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is Tensor and tensor.untyped_storage()._cdata not in given:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


def _allocations(rank: int, world_size: int) -> dict[str, list[int]]:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    model = nn.Sequential(*layers)
    for module in (*layers, model):
        fully_shard(module, mesh=make_mesh(), reshard_after_forward=True)
    attach(model, objectives=Partial("avg"))
    parameters = list(model.parameters())
    groups = grouping.per_layer(model)
    found: dict[str, list[int]] = {}
    for name in (*BY_COLUMNS, "together", "per layer"):
        outputs = model(torch.ones(2, WIDTH))
        losses = [1e3 * part.square().mean() for part in outputs.chunk(TASKS, dim=1)]
        backward(losses)
        stored = {s._cdata: s.nbytes() for s in (_local(p).untyped_storage() for p in parameters)}
        with _Largest() as largest, pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(_graddrop, "CHUNK", 1 << 14)
            monkeypatch.setattr(_graddrop, "AT_ONCE", 1 << 12)
            monkeypatch.setattr(_trimmed_mean, "AT_ONCE", 1 << 12)
            if name in BY_COLUMNS:
                jac_to_grad(parameters, BY_COLUMNS[name]())
            elif name == "together":
                jac_to_grad(parameters, UPGrad())
            else:
                jac_to_grad_groups(groups, [UPGrad() for _ in groups])
        found[name] = [sum(stored.values()), largest.nbytes]
    return found


def _local(parameter: Any) -> Tensor:
    local: Tensor = parameter.jac.to_local()
    return local


def test_no_rank_has_more_than_its_columns_of_the_rows() -> None:
    world_size = 2
    rows = TASKS * SIZE // world_size
    for found in run_ranks(_allocations, world_size):
        for name, (stored, largest) in found.items():
            assert stored == rows, name
            # The result, which is a gradient, and no second matrix of rows.
            assert largest <= SIZE // world_size < rows / 2, name


def test_columns_that_lie_side_by_side_are_not_copied() -> None:
    tensors = [torch.zeros(2, 3), torch.zeros(0, 3), torch.zeros(5), torch.zeros(())]
    rows = adjacent_rows(tensors, 4)
    assert [r.shape for r in rows] == [(4, *t.shape) for t in tensors]
    for i, r in enumerate(rows):
        r.copy_(torch.arange(r.numel()).view(r.shape) + 100 * i)
    pieces = [r.reshape(4, -1) if r.numel() else r.new_zeros(4, 0) for r in rows]
    matrix = _joined(pieces)
    assert torch.equal(matrix, torch.cat(pieces, dim=1))
    assert matrix.data_ptr() == rows[0].data_ptr()
    for others in (
        [pieces[2], pieces[0]],
        [pieces[0], pieces[3]],
        [pieces[0], pieces[0]],
        [pieces[0], pieces[2].clone()],
        [pieces[0], pieces[2].double()],
        [pieces[1]],
    ):
        joined = _joined(others)
        assert torch.equal(joined, torch.cat(others, dim=1))
        assert joined.numel() == 0 or joined.data_ptr() != rows[0].data_ptr()
