"""DistributedDataParallel: parameters replicated, the batch spread over the ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import Placement
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import Parameter

from jddist.errors import UnsupportedModelError

from .base import Distribution, accumulate
from .collectives import Group

_DELAYED = "_static_graph_delay_allreduce_enqueued"
# Elements of gradients that are averaged in one message.
_BUCKET = 1 << 20


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
        # Of wrappers with a static graph: whether their first backward was before a first pass, and
        # which of them are known to have had one that reduced.
        self._delayed: dict[DistributedDataParallel, bool] = {}
        self._started: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
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

    def takes_gradients(self, parameters: Collection[Parameter]) -> bool:
        """Not with options under which the reducer does more than average, or counts backwards."""
        return self.divisor == self.group.size and all(
            _is_ordinary(wrapper)
            and all(p in parameters for p in wrapper.module.parameters() if p.requires_grad)
            for wrapper in self.wrappers
        )

    def write_gradients(
        self,
        parameters: Sequence[Parameter],
        gradients: Sequence[Tensor | None],
        present: Sequence[bool],
    ) -> None:
        """As the reducer does: what had accumulated under ``no_sync`` is averaged along, and one
        bucket is under way while the gradients of the next are computed."""
        if not all(wrapper.require_backward_grad_sync for wrapper in self.wrappers):
            own_gradients = list(gradients)  # before any is written: computing one may fail
            for parameter, gradient, wanted in zip(parameters, own_gradients, present, strict=True):
                if gradient is not None:
                    accumulate(parameter, gradient)
                elif wanted and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            return
        under_way: list[tuple[list[int], list[Tensor], Callable[[], Tensor]]] = []
        for bucket in _buckets(parameters):
            sizes = [parameters[i].numel() for i in bucket]
            flat = parameters[bucket[0]].new_empty(sum(sizes), requires_grad=False)
            means = [
                piece.view(parameters[i].shape)
                for i, piece in zip(bucket, flat.split(sizes), strict=True)
            ]
            for i, mean in zip(bucket, means, strict=True):
                total, own = parameters[i].grad, gradients[i]
                if own is not None:
                    torch.div(own if total is None else total + own, self.divisor, out=mean)
                elif total is not None:
                    torch.div(total, self.divisor, out=mean)
                else:
                    mean.zero_()
            under_way.append((bucket, means, self.group.start_all_reduce(flat)))
        for bucket, means, wait in under_way:
            wait()
            for i, mean in zip(bucket, means, strict=True):
                parameter = parameters[i]
                if parameter.grad is not None:
                    parameter.grad.copy_(mean)
                elif present[i] or mean.any():
                    accumulate(parameter, mean)

    def check_takes_backward(self) -> None:
        """Refuses a backward inside of DDP's own forward, which sets up the reducer at its end.

        Raises:
            RuntimeError: The gradients would silently stay this rank's own.
        """
        active = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if active is not None and active in self.wrappers:
            raise RuntimeError(
                "Found a backward inside of DistributedDataParallel's forward, where Lightning "
                "calls training_step; expected it after, since DDP would leave the gradients "
                "unsynchronised. Use jddist.integrations.lightning, or pass "
                "backward=lambda losses, weights: self.manual_backward(losses, gradient=weights)."
            )

    def check_output(self, output: Tensor) -> None:
        """Refuses a static graph that has gone through a differentiation within the objectives. DDP
        takes it for its first backward, in which no parameter got a gradient, and never averages.

        Raises:
            UnsupportedModelError: It has.
        """
        for wrapper in self.wrappers:
            if not wrapper.static_graph or wrapper in self._started:
                continue
            if not self._delayed.get(wrapper, getattr(wrapper, _DELAYED, False)):
                continue  # This is before the first backward.
            if any(parameter.grad is not None for parameter in wrapper.parameters()):
                continue  # The backward before this one may have been an ordinary one.
            if _begins_static_graph(output, wrapper):
                raise UnsupportedModelError(
                    "Found objectives that differentiate the outputs of a "
                    "DistributedDataParallel(static_graph=True), as a gradient penalty does; "
                    "expected none, since DDP would take that for its first backward and never "
                    "average gradients. Use static_graph=False."
                )
            self._started.add(wrapper)

    def check_reduced(self) -> None:
        """Refuses a backward after which DDP still waits for the gradients of some parameters. It
        would say so at the next forward, when the optimizer has taken what was not averaged.

        Raises:
            UnsupportedModelError: The objectives do not depend on them.
        """
        for wrapper in self.wrappers:
            try:
                wrapper._check_reducer_finalized()
            except RuntimeError as error:
                raise UnsupportedModelError(
                    "Found parameters in a DistributedDataParallel on which the objectives do not "
                    "depend, so that gradients were not averaged over the ranks; expected a "
                    "backward that reaches all that the forward does. Pass "
                    "find_unused_parameters=True and static_graph=False to "
                    "DistributedDataParallel, freeze the parameters, or pass all objectives of one "
                    f"forward to one backward. ({error})"
                ) from error

    def backward_factor(self, placement: Placement) -> float:
        """Refuses a communication hook after which there is no mean over ranks to undo.

        Raises:
            UnsupportedModelError: Such a hook is registered.
        """
        for wrapper in self.wrappers:
            for _, state in wrapper._comm_hooks:
                if getattr(state, "aggregates_ranks", False):
                    raise UnsupportedModelError(
                        "Found a DistributedDataParallel whose communication hook aggregates whole "
                        "ranks; expected one that averages. Call losses.mean().backward(), which "
                        "the hook turns into the step, or leave the hook out."
                    )
        return super().backward_factor(placement)

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
            self._delayed = dict(zip(static, before, strict=True))
            for wrapper in static:
                setattr(wrapper, _DELAYED, True)
            yield
        finally:
            self._delayed = {}
            for wrapper, value in zip(static, before, strict=True):
                setattr(wrapper, _DELAYED, value)


def _begins_static_graph(output: Tensor, wrapper: DistributedDataParallel) -> bool:
    """Whether the forward was before the wrapper's first backward: then DDP put a node of its own
    behind its outputs."""
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        owner = getattr(node, "ddp_weakref", None)
        if owner is not None and owner() is wrapper:
            return True
        waiting.extend(following for following, _ in node.next_functions)
    return False


def _is_ordinary(wrapper: DistributedDataParallel) -> bool:
    """Whether a backward leaves averages in ``.grad`` and nothing else happens.

    With a static graph the reducer counts on the first backward; with views of its buckets it
    counts on ``.grad`` to be one; a communication hook or narrow dtypes make the average another.
    """
    special = (
        wrapper.static_graph
        or wrapper.gradient_as_bucket_view
        or wrapper.mixed_precision is not None
        or wrapper.parameters_to_ignore
        or wrapper._comm_hooks
        or wrapper._use_python_reducer
        or wrapper._join_config.enable
        or wrapper._get_ddp_logging_data().get("comm_hook")
    )
    return not special


def _buckets(parameters: Sequence[Parameter]) -> Iterator[list[int]]:
    """Indices of parameters of one dtype and device that are averaged together."""
    bucket: list[int] = []
    size = 0
    for i, parameter in enumerate(parameters):
        first = parameters[bucket[0]] if bucket else parameter
        alike = first.dtype == parameter.dtype and first.device == parameter.device
        if bucket and (not alike or size + parameter.numel() > _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(i)
        size += parameter.numel()
    if bucket:
        yield bucket
