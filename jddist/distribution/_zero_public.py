"""First passes without DeepSpeed's internals: the model's forward runs a second time.

The module inside an engine has no hooks of the engine's on its outputs (with ZeRO stages 0 to 2),
so a graph of its own can be differentiated freely. It is joined to the losses by the gradients of
the losses at the engine's outputs, which are cut off by an identity so that no hook fires either.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from jddist.autogram.capture import paused
from jddist.errors import UnsupportedModelError


class SecondForward:
    """Remembers an engine's last forward pass, and repeats it for the first pass.

    Args:
        engine: The engine.
    """

    def __init__(self, engine: nn.Module) -> None:
        self._engine = weakref.ref(engine)
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._random: list[tuple[Callable[[Tensor], None], Tensor]] = []
        self._edges: list[GradientEdge] = []
        self._inside = False
        self._handles = [
            engine.register_forward_pre_hook(self._before, with_kwargs=True),
            engine.register_forward_hook(self._after),
        ]

    def release(self) -> None:
        """Takes the hooks off the engine and forgets its last forward pass."""
        for handle in self._handles:
            handle.remove()
        self._call, self._edges = None, []

    def on_second_graph(self, output: Tensor) -> Tensor:
        """Objectives of the same values and Jacobian as ``output``, on a graph of their own.

        Args:
            output: Objectives of any shape, computed from the engine's last outputs.

        Raises:
            UnsupportedModelError: There was no forward pass through the engine.
        """
        engine: Any = self._engine()
        if self._call is None or engine is None:
            raise UnsupportedModelError(
                "Found losses of a forward pass that jddist did not see; expected "
                "model_engine(inputs), after jddist.attach(model_engine)."
            )
        cotangents = self._at_outputs(output)
        args, kwargs = self._call
        with self._replayed():
            again = engine.module(*args, **kwargs)
        outputs = [t for t in tree_flatten(again)[0] if _has_graph(t)]
        rows = output.new_zeros(output.numel())
        for tensor, at in zip(outputs, cotangents, strict=True):
            product = at.reshape(len(rows), -1).to(rows.dtype) @ tensor.reshape(-1).to(rows.dtype)
            rows = rows + product
        # The values of the losses, and the gradients of the products.
        return output.detach() + (rows - rows.detach()).view(output.shape)

    def _at_outputs(self, output: Tensor) -> list[Tensor]:
        """The Jacobian of all elements of ``output`` at each of the engine's outputs."""
        flat = output.reshape(-1)
        columns: list[list[Tensor]] = []
        inputs: Any = self._edges
        with paused():
            for row in torch.eye(len(flat), dtype=output.dtype, device=output.device):
                found = torch.autograd.grad(
                    flat, inputs, row, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                columns.append(list(found))
        if not columns:
            return [output.new_zeros(0, 1)] * len(self._edges)
        return [torch.stack(column) for column in zip(*columns, strict=True)]

    def _before(self, engine: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self._call = (args, kwargs)
            self._random = _random_states(engine)

    def _after(self, _engine: nn.Module, _inputs: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        leaves, spec = tree_flatten(output)
        leaves = [_Identity.apply(t) if _has_graph(t) else t for t in leaves]
        self._edges = [get_gradient_edge(t) for t in leaves if _has_graph(t)]
        return tree_unflatten(leaves, spec)

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        engine = self._engine()
        assert engine is not None
        now = _random_states(engine)
        try:
            for restore, state in self._random:
                restore(state)
            yield
        finally:
            for restore, state in now:
                restore(state)


class _Identity(torch.autograd.Function):
    """A tensor of its own, whose gradient is taken without touching that of the argument."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def _has_graph(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _random_states(engine: nn.Module) -> list[tuple[Callable[[Tensor], None], Tensor]]:
    """The states of the random streams that a forward draws from, with what restores them."""
    states: list[tuple[Callable[[Tensor], None], Tensor]] = [
        (torch.set_rng_state, torch.get_rng_state())
    ]
    device = next((p.device for p in engine.parameters() if p.device.type != "cpu"), None)
    if device is not None:
        module = torch.get_device_module(device)
        state = module.get_rng_state(device)
        states.append((lambda saved: module.set_rng_state(saved, device), state))
    return states
