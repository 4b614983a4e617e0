"""DistributedDataParallel: parameters replicated, the batch spread over the ranks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.distributed.tensor import Placement
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import Parameter

from .base import Distribution
from .collectives import Group

_DELAYED = "_static_graph_delay_allreduce_enqueued"


class DataParallel(Distribution):
    """Parameters wrapped in DDP, whose reducer averages gradients over its process group.

    Args:
        wrappers: The DDP wrappers, all over the same process group.
        objectives: The placement of autojac's rows, or None.

    Raises:
        ValueError: The wrappers have different process groups.
    """

    def __init__(
        self, wrappers: list[DistributedDataParallel], objectives: Placement | None
    ) -> None:
        groups = {wrapper.process_group for wrapper in wrappers}
        if len(groups) != 1:
            raise ValueError(
                f"Found DistributedDataParallel wrappers over {len(groups)} process groups; "
                "expected one. Wrap all parts of the model over the same group."
            )
        super().__init__(Group(wrappers[0].process_group), objectives)
        self._wrappers = [weakref.ref(wrapper) for wrapper in wrappers]
        for wrapper in wrappers:
            self.register(wrapper.module)

    @property
    def wrappers(self) -> list[DistributedDataParallel]:
        """The wrappers that are still alive."""
        alive = [ref() for ref in self._wrappers]
        return [wrapper for wrapper in alive if wrapper is not None]

    def reduce_accumulated(self, parameters: Sequence[Parameter]) -> None:
        """The mean over ranks, as the reducer would have taken it; gradients that were reduced
        already are the same on all ranks, and stay so."""
        if not all(wrapper.require_backward_grad_sync for wrapper in self.wrappers):
            return
        for parameter in parameters:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            total = self.group.all_reduce(grad.detach().clone()) / self.divisor
            if parameter.grad is not None:
                parameter.grad.copy_(total)
            elif total.any():
                parameter.grad = total

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """With ``static_graph``, the first backward that reaches DDP's outputs makes the reducer
        wait for the end of *that* backward; a first pass must not be taken for it, or the weighted
        backward stays unsynchronised."""
        static = [w for w in self.wrappers if w.static_graph]
        for wrapper in static:
            if not hasattr(wrapper, _DELAYED):
                raise RuntimeError(
                    f"Found a DistributedDataParallel without the attribute {_DELAYED}, which "
                    "static_graph=True needs; expected torch 2.11 to 2.13. Use static_graph=False."
                )
        before = [getattr(wrapper, _DELAYED) for wrapper in static]
        try:
            for wrapper in static:
                setattr(wrapper, _DELAYED, True)
            yield
        finally:
            for wrapper, value in zip(static, before, strict=True):
                setattr(wrapper, _DELAYED, value)
