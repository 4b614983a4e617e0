"""What travels between the stages of the engine: a call seen at forward time, then its gradients.

The normal form of every later formula: an input is ``a`` [b, ..., in], an output's gradient is
``g`` [k, b, ..., out], for k objectives per sample and b samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jddist.errors import ModifiedInputError


@dataclass(frozen=True)
class RngSnapshot:
    """The random number generators as they stood before a call, to replay its dropout."""

    cpu: Tensor
    device: torch.device | None
    accelerator: Tensor | None


@dataclass(frozen=True)
class AutocastSnapshot:
    """The autocast settings under which a call ran."""

    device_type: str
    enabled: bool
    dtype: torch.dtype


@dataclass(eq=False)
class CallRecord:
    """One call of one module. It lives in the metadata of the graph nodes of the call's outputs.

    It must never refer to a graph node: the node owns the record, and a reference back would keep
    the whole graph alive.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output_shapes: list[torch.Size]
    differentiable: list[bool]
    training: bool
    autocast: AutocastSnapshot
    rng: RngSnapshot | None
    watched: list[tuple[Tensor, int]] = field(default_factory=list)
    changed_buffers: bool = False
    parameters: list[tuple[Tensor, int]] = field(default_factory=list)
    released: bool = False

    def release(self) -> None:
        """Lets go of the call's inputs."""
        self.args, self.kwargs, self.watched, self.rng, self.parameters = (), {}, [], None, []
        self.released = True

    @property
    def is_repeatable(self) -> bool:
        """Whether the module's forward would do the same once more, and nothing else: it left its
        buffers as they were, and its parameters are what they were."""
        return not self.changed_buffers and all(p._version == v for p, v in self.parameters)

    def check_unmodified(self, name: str) -> None:
        """Raises ModifiedInputError if an input was changed in place since the call."""
        for tensor, version in self.watched:
            if tensor._version != version:
                raise ModifiedInputError(
                    f"Found an input of shape {tuple(tensor.shape)} of module '{name}' "
                    f"({type(self.module).__name__}) that was modified in place after the call; "
                    "expected it unchanged until the Gramian is computed. Use the out-of-place "
                    "form of the operation, or clone the input first."
                )


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """A call together with the gradients of its outputs: all that a layer rule gets to see.

    Attributes:
        module: The module that was called.
        args: Its positional inputs, detached.
        kwargs: Its keyword inputs, detached.
        grads: One tensor per output tensor, [k, b, ...] (None for an output without gradient).
        call: The full record of the call.
        batch: The number of samples b.
        batched: Whether dimension 0 of inputs and outputs holds the samples. If not, the call is
            one single sample (b = 1) whose tensors have no batch dimension, and ``grads`` are
            [k, 1, ...].
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grads: Sequence[Tensor | None]
    call: CallRecord
    batch: int
    batched: bool

    @property
    def input(self) -> Tensor:
        """The input of a layer that has one, under torch's usual name for it."""
        found: Tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return found
