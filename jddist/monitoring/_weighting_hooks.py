"""Watches a weighting that the user calls: every call of it is a step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from jddist._observing import Observer, StepRecord, Weighed


def watch_weighting(weighting: nn.Module, observer: Observer) -> Callable[[], None]:
    """Tells an observer of every call of a weighting, which is handed a (generalized) Gramian.

    Returns:
        A function that ends it.
    """

    def before(_module: nn.Module, _inputs: object) -> None:
        observer.begins()
        observer.weighs([weighting])

    def after(_module: nn.Module, inputs: tuple[Tensor, ...], weights: Tensor) -> None:
        observer.weighed([weighting])
        observer.ends(StepRecord((Weighed("", inputs[0].detach(), weights.detach()),)))

    handles = [
        weighting.register_forward_pre_hook(before),
        weighting.register_forward_hook(after),
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
