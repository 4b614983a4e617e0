"""Leaves of the autograd graph: the parameters that a tensor depends on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import Node


def leaves_of(tensors: Iterable[Tensor], *, excluded: Iterable[Tensor] = ()) -> list[Tensor]:
    """The leaf tensors that require a gradient and on which ``tensors`` depend, breadth first.

    Args:
        tensors: Where to start.
        excluded: Tensors behind which not to look.

    Raises:
        ValueError: One of the tensors has no graph.
    """
    stop = {_node_of(tensor, "excluded") for tensor in excluded}
    queue = deque(node for node in dict.fromkeys(_node_of(t, "tensors") for t in tensors))
    queue = deque(node for node in queue if node not in stop)
    seen = stop | set(queue)
    leaves: dict[Tensor, None] = {}
    while queue:
        node = queue.popleft()
        if type(node).__name__ == "AccumulateGrad":
            leaves[node.variable] = None  # type: ignore[attr-defined]
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                queue.append(child)
    return list(leaves)


def _node_of(tensor: Tensor, name: str) -> Node:
    if tensor.grad_fn is None:
        raise ValueError(
            f"Found a tensor of shape {tuple(tensor.shape)} without a graph among `{name}`; "
            "expected the result of a computation on parameters. Pass what the model computed."
        )
    return tensor.grad_fn
