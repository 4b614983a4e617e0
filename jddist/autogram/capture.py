"""Forward hooks that leave a CallRecord on the graph nodes of each hooked module's outputs.

A module is hooked once however many engines use it. The records belong to the autograd graph, not
to an engine: they go when the graph is freed, so a validation forward leaves nothing behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from jddist._progress import progress

from .record import AutocastSnapshot, CallRecord, RngSnapshot

_METADATA_KEY = "jddist"

_paused = 0  # a plain counter: on CUDA, recomputed forwards run in autograd's own threads
_taps: weakref.WeakKeyDictionary[nn.Module, _Tap] = weakref.WeakKeyDictionary()


@contextmanager
def paused() -> Iterator[None]:
    """Inside, no call is recorded (recomputed checkpoints, re-run forwards) and none released."""
    global _paused
    _paused += 1
    try:
        yield
    finally:
        _paused -= 1


@dataclass(frozen=True, eq=False)
class Mark:
    """What is left on a graph node: which output of which call its gradient belongs to.

    Attributes:
        record: The call.
        index: The index of the output tensor.
        output_nr: The node's output.
        geometry: None, or the output's shape and strides if the node is that of its base.
    """

    record: CallRecord
    index: int
    output_nr: int
    geometry: tuple[torch.Size, tuple[int, ...]] | None = None


class _Tap:
    """The hooks of one module, shared by all the engines that use it."""

    def __init__(self, module: nn.Module, needs_rng: bool) -> None:
        self.users = 0
        self.needs_rng = needs_rng
        self._rng: list[RngSnapshot | None] = []
        self._buffers: list[tuple[int, int]] = []
        self._passed: weakref.WeakSet[CallRecord] = weakref.WeakSet()
        # Compiled code is left for a hook: what it records must be tensors of the real graph.
        self._before_eagerly = torch.compiler.disable(self._before)
        self._after_eagerly = torch.compiler.disable(self._after)
        # Before other hooks: sharding wrappers cast or free tensors in theirs.
        self.handles: list[RemovableHandle] = [
            module.register_forward_hook(self._post_hook, prepend=True, with_kwargs=True),
            module.register_forward_pre_hook(self._pre_hook, with_kwargs=True),
        ]

    def _pre_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        compiling = torch.compiler.is_compiling()
        (self._before_eagerly if compiling else self._before)(module, args, kwargs)

    def _post_hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        compiling = torch.compiler.is_compiling()
        (self._after_eagerly if compiling else self._after)(module, args, kwargs, output)

    def _passing_hook(self, record: CallRecord) -> Callable[[Tensor], None]:
        """Notes that a backward went by: autograd frees its own tensors then, unless it was told
        to retain the graph. The record's are freed when the module is called again."""
        passed = self._passed

        def hook(_gradient: Tensor) -> None:
            if not _paused:
                passed.add(record)

        return hook

    def __getstate__(self) -> dict[str, Any]:
        """A copied or unpickled module keeps the hooks, which then do nothing."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._before_eagerly, self._after_eagerly = self._before, self._after

    def _is_idle(self, module: nn.Module) -> bool:
        return bool(_paused) or not torch.is_grad_enabled() or _taps.get(module) is not self

    def release_passed(self) -> None:
        """Frees the records by which a backward went."""
        for record in self._passed:
            record.release()
        self._passed.clear()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _taps.get(module) is self and not _paused:
            progress.enter_forward()
            self.release_passed()
        if self._is_idle(module):
            return
        self._rng = [_snapshot_rng(module)] if self.needs_rng and module.training else []
        self._buffers = _versions_of_buffers(module) if self.needs_rng else []

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._is_idle(module):
            return
        rng = self._rng.pop() if self._rng else None
        if not any(p.requires_grad for p in module.parameters()):
            return
        leaves, _ = tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(t.requires_grad for t in tensors):
            return
        record = _make_record(module, args, kwargs, tensors, rng)
        if self.needs_rng:
            record.changed_buffers = self._buffers != _versions_of_buffers(module)
            kept = (p for p in module.parameters() if not p.is_inference())
            record.parameters = [(p, p._version) for p in kept]
        for index, tensor in enumerate(tensors):
            if tensor.grad_fn is None:
                continue
            _mark(tensor, Mark(record, index, get_gradient_edge(tensor).output_nr))
            tensor.register_hook(self._passing_hook(record))
            base = tensor._base
            if base is None or not base.requires_grad:  # the base of a DTensor has no history
                continue
            if base.is_contiguous() and base.numel() == tensor.numel():
                # An in-place operation on a view rewrites the view's history and keeps the base's.
                geometry = (tensor.shape, tensor.stride())
                nr = get_gradient_edge(base).output_nr
                _mark(base, Mark(record, index, nr, geometry))


def marks_of(node: Node) -> list[Mark]:
    """The marks on a graph node."""
    metadata: dict[str, list[Mark]] = node.metadata  # type: ignore[assignment]
    return metadata.get(_METADATA_KEY, [])


def _mark(tensor: Tensor, mark: Mark) -> None:
    if tensor.grad_fn is not None:
        metadata: dict[str, list[Mark]] = tensor.grad_fn.metadata  # type: ignore[assignment]
        metadata.setdefault(_METADATA_KEY, []).append(mark)


class Capture:
    """An engine's hold on the hooks of its modules; ``release`` (or its end of life) lets go.

    Args:
        modules: The modules to hook.
        needs_rng: Those among them whose forward may have to be repeated with its random numbers.
    """

    def __init__(self, modules: Iterable[nn.Module], needs_rng: Iterable[nn.Module]) -> None:
        with_rng = set(needs_rng)
        hooked = list(modules)
        for module in hooked:
            tap = _taps.get(module)
            if tap is None:
                tap = _taps[module] = _Tap(module, module in with_rng)
            tap.users += 1
            tap.needs_rng |= module in with_rng
        self._modules = [weakref.ref(m) for m in hooked]
        self.release = weakref.finalize(self, _release, self._modules)

    def release_passed(self) -> None:
        """Frees the records by which a backward went that did not retain the graph."""
        for ref in self._modules:
            module = ref()
            tap = None if module is None else _taps.get(module)
            if tap is not None:
                tap.release_passed()


def _release(modules: list[weakref.ref[nn.Module]]) -> None:
    for ref in modules:
        module = ref()
        tap = None if module is None else _taps.get(module)
        if module is None or tap is None:
            continue
        tap.users -= 1
        if tap.users == 0:
            tap.remove()
            del _taps[module]


def _make_record(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: list[Tensor],
    rng: RngSnapshot | None,
) -> CallRecord:
    leaves, spec = tree_flatten((args, kwargs))
    watched = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaves[i] = leaf.detach()
            if not leaf.is_inference():
                watched.append((leaves[i], leaf._version))
    detached_args, detached_kwargs = tree_unflatten(leaves, spec)
    device_type = outputs[0].device.type
    autocast = AutocastSnapshot(
        device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    )
    return CallRecord(
        module=module,
        args=detached_args,
        kwargs=detached_kwargs,
        output_shapes=[t.shape for t in outputs],
        differentiable=[t.grad_fn is not None for t in outputs],
        training=module.training,
        autocast=autocast,
        rng=rng,
        watched=watched,
    )


def _versions_of_buffers(module: nn.Module) -> list[tuple[int, int]]:
    """Which buffers there are, and how often each has been written to."""
    return [(id(b), 0 if b.is_inference() else b._version) for b in module.buffers()]


def _snapshot_rng(module: nn.Module) -> RngSnapshot:
    device = next((p.device for p in module.parameters() if p.device.type != "cpu"), None)
    if device is None:
        return RngSnapshot(torch.get_rng_state(), None, None)
    accelerator = torch.get_device_module(device).get_rng_state(device)
    return RngSnapshot(torch.get_rng_state(), device, accelerator)
