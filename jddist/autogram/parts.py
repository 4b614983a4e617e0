"""Calls of tensor-parallel layers: from what a call recorded to this rank's part of it.

The weight [out, in] of a Linear is sharded along one of its dimensions, and with it the gradients
of the outputs or the inputs. So this rank's columns of a row are outer products of what is at hand,
and the layer's closed form serves them as it is. A layer whose parameters are held alike by all
ranks gets its whole inputs and gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.utils._pytree import tree_map

from jddist.distribution.collectives import column_bounds
from jddist.distribution.cut import part_of
from jddist.distribution.lockstep import settled

from .parameters import Owner
from .record import LayerRecord


def takes_parts(owner: Owner, leaves: Mapping[str, Tensor]) -> bool:
    """Whether a rank's part of a call leads to its columns of the rows.

    Args:
        owner: The module that was called.
        leaves: Its parameters, as the graph knows them.
    """
    module = owner.module
    placed = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, DTensor)}
    if owner.rule is None:  # it is run again under vmap, where no collective communicates
        return not any(isinstance(p, DTensor) for p in [*module.parameters(), *placed.values()])
    if any("." in path or leaf.device_mesh.ndim != 1 for path, leaf in placed.items()):
        return False
    dims = {path: _sharded_dim(leaf) for path, leaf in leaves.items()}
    if all(dim is None for dim in dims.values()):
        return True
    if isinstance(module, nn.Linear):
        return (dims["weight"], dims.get("bias")) in ((0, 0), (1, None)) or (
            dims["weight"] == 0 and "bias" not in dims
        )
    return isinstance(module, nn.Embedding) and dims["weight"] in (0, 1)


def of_parts(record: LayerRecord, leaves: Mapping[str, Tensor]) -> LayerRecord:
    """The record of this rank's part of a call; the ranks may have to exchange activations.

    Args:
        record: The call, for whose owner ``takes_parts`` is true.
        leaves: Its parameters, as the graph knows them.
    """
    weight = leaves.get("weight")
    dim = None if weight is None else _sharded_dim(weight)
    embeds = isinstance(record.module, nn.Embedding)
    by_inputs = dim == 1 and not embeds
    by_outputs = dim == 0 and not embeds or dim == 1 and embeds
    whole, mesh = record.input, weight.device_mesh if isinstance(weight, DTensor) else None

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return _part(leaf, mesh, Shard(leaf.ndim - 1) if by_inputs and leaf is whole else None)

    args, kwargs = tree_map(part, (record.args, record.kwargs))
    grads = [
        None if g is None else _part(g, mesh, Shard(g.ndim - 1) if by_outputs else None)
        for g in record.grads
    ]
    module = _with_parts(record.module, leaves)
    if embeds and dim == 0:
        assert isinstance(weight, DTensor) and isinstance(module, nn.Embedding)
        lines = _lines_at_hand(module, weight, args[0] if args else next(iter(kwargs.values())))
        args, kwargs = (lines,), {}
    return replace(record, module=module, args=args, kwargs=kwargs, grads=grads)


def _sharded_dim(leaf: Tensor) -> int | None:
    """The dimension along which a parameter on a mesh of one dimension is sharded."""
    if not isinstance(leaf, DTensor) or leaf.placements[0].is_replicate():
        return None
    dim: int = leaf.placements[0].dim  # type: ignore[attr-defined]
    return dim


def _part(tensor: Tensor, mesh: Any, wanted: Placement | None) -> Tensor:
    """This rank's part of a tensor, or by default all of it."""
    if not isinstance(tensor, DTensor):
        if wanted is None:
            return settled(tensor)
        tensor = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    placements = [Replicate()] * tensor.device_mesh.ndim if wanted is None else [wanted]
    return settled(tensor.redistribute(placements=placements).to_local())


def _with_parts(module: nn.Module, leaves: Mapping[str, Tensor]) -> nn.Module:
    """The module with this rank's parts of its parameters; nothing else may be done with it."""
    if not any(isinstance(leaf, DTensor) for leaf in leaves.values()):
        return module
    # Copying a module in fully_shard would build it anew.
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin._parameters = dict(module._parameters)
    for path, leaf in leaves.items():
        if isinstance(leaf, DTensor):
            local = part_of(leaf).requires_grad_(leaf.requires_grad)
            twin._parameters[path] = local  # type: ignore[assignment]
    if isinstance(twin, nn.Embedding):
        twin.num_embeddings, twin.embedding_dim = twin._parameters["weight"].shape  # type: ignore[union-attr]
    return twin


def _lines_at_hand(module: nn.Embedding, weight: DTensor, tokens: Tensor) -> Tensor:
    """Tokens as lines of this rank's part of the table; the others as padding."""
    mesh = weight.device_mesh
    start, stop = column_bounds(weight.shape[0], mesh.size())[mesh.get_local_rank()]
    elsewhere = (tokens < start) | (tokens >= stop)
    if module.padding_idx is not None:
        elsewhere = elsewhere | (tokens == module.padding_idx)
    module.padding_idx = stop - start
    return torch.where(elsewhere, stop - start, tokens - start)
