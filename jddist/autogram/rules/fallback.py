"""The rows of any module: a vector-Jacobian product per sample, vmapped over the batch.

The module's forward runs once more, sample by sample under vmap, with its parameters swapped for
tracked copies, with the autocast state and the random numbers of the recorded call.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..blocks import DenseBlock, JacobianBlock
from ..capture import paused
from ..record import CallRecord, LayerRecord, RngSnapshot


def batched_leaves(call: CallRecord, batch: int) -> tuple[bool, ...]:
    """For each leaf of the call's inputs, whether it is a tensor with one entry per sample."""
    leaves, _ = tree_flatten((call.args, call.kwargs))
    return tuple(
        isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch for leaf in leaves
    )


def vjp_rows(record: LayerRecord, paths: list[str]) -> dict[str, JacobianBlock]:
    """Rows of the parameters at ``paths`` below the module, for one batched call.

    Args:
        record: A call with a batch dimension.
        paths: Relative names of the parameters.

    Raises:
        RuntimeError: The module's forward cannot be vmapped.
    """
    assert record.batched
    module = record.module
    leaves, spec = tree_flatten((record.args, record.kwargs))
    dims = [0 if batched else None for batched in batched_leaves(record.call, record.batch)]
    mapped = [leaf for leaf, dim in zip(leaves, dims, strict=True) if dim is not None]
    parameters = {path: module.get_parameter(path).detach() for path in paths}
    wanted = [g is not None for g in record.grads]
    cotangents = [g for g in record.grads if g is not None]

    def outputs_of_sample(sample: list[Tensor], values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        pieces = iter(sample)
        inputs = [
            leaf if dim is None else next(pieces).unsqueeze(0)
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        args, kwargs = tree_unflatten(inputs, spec)
        with _swapped(module, values):
            output = module.forward(*args, **kwargs)
        tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
        return tuple(t for t, keep in zip(tensors, wanted, strict=True) if keep)

    def rows_of_sample(sample: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
        pullback = torch.func.vjp(lambda v: outputs_of_sample(sample, v), parameters)[1]

        def row(grad: list[Tensor]) -> dict[str, Tensor]:
            (result,) = pullback(tuple(g.unsqueeze(0) for g in grad))
            return result

        if len(grads[0]) == 1:  # no need for a second level of vmap, where some operators fail
            only = row([g.squeeze(0) for g in grads])
            return {path: value.unsqueeze(0) for path, value in only.items()}
        return torch.func.vmap(row, randomness="error")(grads)

    with paused(), as_recorded(record.call), warnings.catch_warnings():
        # vmap announces operators that it has to loop over; the result is the same.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        per_sample = torch.func.vmap(rows_of_sample, in_dims=(0, 1), randomness="different")
        rows = per_sample(mapped, cotangents)  # [b, k, *shape]
    for path, value in rows.items():
        expected = (record.batch, len(cotangents[0]), *parameters[path].shape)
        if value.shape != expected:
            raise RuntimeError(
                f"vmap gave rows of shape {tuple(value.shape)} for '{path}' instead of {expected}"
            )
    return {
        path: DenseBlock(value.reshape(-1, parameters[path].numel()))
        for path, value in rows.items()
    }


@contextmanager
def _swapped(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets ``module`` read ``values`` for its parameters.

    ``torch.func.functional_call`` would call the module, and with it every hook of the user's and
    of sharding wrappers once more.
    """
    originals: list[tuple[nn.Module, str, Any]] = []
    try:
        for path, value in values.items():
            parent, _, name = path.rpartition(".")
            owner = module.get_submodule(parent)
            originals.append((owner, name, owner._parameters[name]))
            owner._parameters[name] = value  # type: ignore[assignment]
        yield
    finally:
        for owner, name, original in originals:
            owner._parameters[name] = original


@contextmanager
def as_recorded(call: CallRecord) -> Iterator[None]:
    """The autocast state and random numbers of the recorded call, undone afterwards."""
    now = None if call.rng is None else _current_rng(call.rng)
    autocast = call.autocast
    try:
        if call.rng is not None:
            _restore_rng(call.rng)
        with torch.autocast(autocast.device_type, dtype=autocast.dtype, enabled=autocast.enabled):
            yield
    finally:
        if now is not None:
            _restore_rng(now)


def _current_rng(like: RngSnapshot) -> RngSnapshot:
    accelerator = None
    if like.device is not None:
        accelerator = torch.get_device_module(like.device).get_rng_state(like.device)
    return RngSnapshot(torch.get_rng_state(), like.device, accelerator)


def _restore_rng(snapshot: RngSnapshot) -> None:
    torch.set_rng_state(snapshot.cpu)
    if snapshot.device is not None:
        assert snapshot.accelerator is not None
        torch.get_device_module(snapshot.device).set_rng_state(
            snapshot.accelerator, snapshot.device
        )
