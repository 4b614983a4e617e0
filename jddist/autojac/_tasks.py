"""What is checked of tasks, whoever differentiates them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from jddist.errors import NonFiniteObjectiveError

from ._arguments import check_shapes


def check_disjoint(shared: Iterable[Tensor], tasks_params: Sequence[Sequence[Tensor]]) -> None:
    """Raises ValueError if a shared parameter is some task's own."""
    if set(shared) & {p for params in tasks_params for p in params}:
        raise ValueError(
            "Found a tensor both in `shared_params` and in `tasks_params`; expected each in one of "
            "them. Are `features` the last tensors that all tasks share?"
        )


def starting_gradients(losses: list[Tensor], given: Sequence[Tensor] | None) -> list[Tensor]:
    """The gradients from which the tasks' losses are differentiated; ones by default."""
    if given is None:
        if any(loss.ndim > 0 for loss in losses):
            raise ValueError(
                f"Found `tensors` of shapes {[list(loss.shape) for loss in losses]} without "
                "`grad_tensors`; expected scalars. Pass scalar losses, or `grad_tensors`."
            )
        return [torch.ones_like(loss) for loss in losses]
    check_shapes(given, losses, "grad_tensors", "tensors", leading=0)
    return list(given)


def check_tasks_finite(finite: Sequence[Sequence[bool]], shares: Sequence[Sequence[float]]) -> None:
    """Raises NonFiniteObjectiveError if a task that counts is not finite on some rank."""
    bad = [
        f"task {task} (rank {rank})"
        for rank, flags in enumerate(finite)
        for task, ok in enumerate(flags)
        if not ok and shares[rank][task]
    ]
    if bad:
        raise NonFiniteObjectiveError(
            f"Found NaN or infinity in the loss or the gradient of {', '.join(bad[:8])}; expected "
            "finite ones. No .grad or .jac was written. Lower the learning rate, or look at that "
            "rank's data; a task without samples takes count=0."
        )
