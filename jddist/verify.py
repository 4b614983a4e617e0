"""``verify``: the engine's Gramian against brute force, layer by layer, on the user's own model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement

from jddist.autogram import global_pass
from jddist.autogram.by_layer import of_parameters
from jddist.autogram.engine import Engine
from jddist.distribution.counts import Count
from jddist.distribution.exchange import scale_rows
from jddist.distribution.lockstep import as_plain


def verify(
    model: nn.Module,
    output: Tensor | Callable[[], Tensor],
    *,
    batch_dim: int | None,
    objectives: Placement | None = None,
    count: Count | None = None,
) -> dict[str, float]:
    """Compares the engine's Gramian with that of a Jacobian computed one row at a time.

    Slow and memory-hungry: it is meant for one batch of a small version of a model, in float64,
    before a long run. Every rank has to call.

    Args:
        model: The model, wrapped or not.
        output: This rank's objectives, computed after an ``Engine`` on the model was created, or a
            function that computes them. (Without an engine at the time of the forward pass there
            are no records to check: a warning says so.) The graph is kept.
        batch_dim: As for ``Engine``.
        objectives: As for ``Engine``.
        count: As for ``Engine.compute_gramian``.

    Returns:
        For each module with parameters, the relative error (Frobenius norm) of the global Gramian
        with respect to its parameters: about 1e-15 in float64, 1e-6 in float32. 0 if both are zero.
    """
    engine = Engine(model, batch_dim=batch_dim, objectives=objectives)
    engine.distribution.check_gives_rows()
    if not isinstance(output, Tensor):
        output = output()
    output = as_plain(output)
    layout, blocks = engine.prepare("verify", output, count)
    table, distribution = engine.table, engine.distribution
    errors: dict[str, float] = {}
    for owner in table.owners:
        indices = {table.index_of[p] for p in owner.paths.values() if p.requires_grad}
        if not indices:
            continue
        part, kept = of_parameters(layout, blocks, indices)
        found = global_pass.gramian(distribution, part, kept, output, table).values
        parameters = [table.entries[i].parameter for i in sorted(indices)]
        leaves = distribution.leaves()
        reached = [leaves.get(p, p) for p in parameters]
        with distribution.first_pass():
            rows = _rows_one_by_one(layout.local.rows_of(output), reached)
        expected = _brute_force(engine, layout, rows)
        norm = float(expected.norm())
        difference = float((found - expected).norm())
        name = owner.name or type(owner.module).__name__
        errors[name] = difference / norm if norm else difference
    return errors


def _rows_one_by_one(objectives: Tensor, parameters: list[Tensor]) -> Tensor:
    rows = [
        torch.cat(
            [
                _whole(g).reshape(-1)
                for g in torch.autograd.grad(
                    objective,
                    parameters,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            ]
        )
        for objective in objectives
    ]
    width = sum(p.numel() for p in parameters)
    return torch.stack(rows).double() if rows else objectives.new_zeros(0, width).double()


def _whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def _brute_force(engine: Engine, layout: global_pass.GlobalLayout, rows: Tensor) -> Tensor:
    """The Gramian of all ranks' rows, by sending them all everywhere."""
    group = engine.distribution.group
    if layout.sharded:
        per_sample = rows.shape[1] * layout.objectives
        lengths = [size * per_sample for size in layout.sizes]
        gathered = group.all_gather_uneven(rows.reshape(-1), lengths)
        rows = torch.cat(gathered).view(-1, rows.shape[1])
    else:
        scale = rows.new_tensor(layout.row_scale)
        rows = group.all_reduce(scale_rows(rows, scale))
    return rows @ rows.T
