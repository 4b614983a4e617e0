"""One walk over the autograd graph of an output: which recorded calls and parameters it reaches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Size, Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn.parameter import Parameter

from jddist.errors import UnsupportedModelError

from .capture import Mark, marks_of
from .record import CallRecord

# A node, and at which of its inputs another node's output is.
Consumer = tuple[Node, int]


@dataclass(eq=False)
class ReachedCall:
    """A recorded call with the graph edges of those of its outputs that the output depends on.

    Attributes:
        record: The call.
        edges: For each such output, the edge at which its gradient is taken.
        geometries: For outputs whose edge is that of their base: their shape and strides.
        broadcast: For outputs whose edge is that of a sum behind a broadcast: its batch size.
    """

    record: CallRecord
    edges: dict[int, GradientEdge] = field(default_factory=dict)
    geometries: dict[int, tuple[Size, tuple[int, ...]]] = field(default_factory=dict)
    broadcast: dict[int, int] = field(default_factory=dict)

    def add(self, mark: Mark, node: Node) -> None:
        """Notes that ``node``, which carries ``mark``, was reached."""
        edge = GradientEdge(node, mark.output_nr)
        if mark.geometry is None:
            self.edges[mark.index] = edge
            self.geometries.pop(mark.index, None)
        elif mark.index not in self.edges:
            self.edges[mark.index] = edge
            self.geometries[mark.index] = mark.geometry

    def look_behind_broadcasts(self, consumers: Mapping[Node, Sequence[Consumer]]) -> None:
        """Where an output of batch 1 is only added to tensors with a batch, takes its gradient at
        the sum: autograd has added up the samples before it reaches the output itself."""
        for index, edge in self.edges.items():
            shape = self.record.output_shapes[index]
            users = consumers.get(edge.node, ())
            if len(shape) < 2 or shape[0] != 1 or index in self.geometries or len(users) != 1:
                continue
            ((node, position),) = users
            if type(node).__name__ != "AddBackward0":
                continue
            if position == 1 and node._saved_alpha != 1:  # type: ignore[attr-defined]
                continue
            total = tuple(node._input_metadata[0].shape)
            if len(total) == len(shape) and total[0] > 1 and total[1:] == shape[1:]:
                self.edges[index] = GradientEdge(node, 0)
                self.broadcast[index] = total[0]

    def batch_of(self, index: int) -> int | None:
        """The size of dimension 0 of an output's gradient."""
        shape = self.record.output_shapes[index]
        return self.broadcast.get(index, shape[0] if shape else None)

    def output_gradient(self, index: int, gradient: Tensor) -> Tensor:
        """The gradient of output ``index`` [k, *shape] from that at its edge."""
        if index not in self.geometries:
            return gradient
        shape, strides = self.geometries[index]
        flat = gradient.reshape(len(gradient), -1).contiguous()
        return flat.as_strided((len(flat), *shape), (flat.stride(0), *strides))


@dataclass(frozen=True, eq=False)
class ReachedGraph:
    """The recorded calls (in no particular order) and the leaf tensors below an output.

    ``structure`` counts the kinds of nodes: another value is another graph. ``consumers`` are the
    nodes that each node's gradient comes from, ``accumulators`` the nodes of the leaves.
    """

    calls: list[ReachedCall]
    leaves: set[Parameter]
    structure: frozenset[tuple[str, int]]
    consumers: Mapping[Node, Sequence[Consumer]]
    accumulators: Mapping[Tensor, Node]

    def is_read_beside(self, leaf: Tensor, calls: Iterable[ReachedCall]) -> bool:
        """Whether a path leads from ``leaf`` to the output that passes no output of ``calls``."""
        ends = {edge.node for call in calls for edge in call.edges.values()}
        stack = [self.accumulators[leaf]] if leaf in self.accumulators else []
        seen = set(stack)
        while stack:
            consumers = self.consumers.get(stack.pop())
            if consumers is None:
                return True
            fresh = {node for node, _ in consumers} - ends - seen
            seen |= fresh
            stack += fresh
        return False

    def above(self, nodes: Iterable[Node]) -> set[Node]:
        """The nodes from which a path leads down to one of ``nodes``, the start left out."""
        found: set[Node] = set()
        stack = list(nodes)
        while stack:
            for consumer, _ in self.consumers.get(stack.pop(), ()):
                if consumer not in found:
                    found.add(consumer)
                    stack.append(consumer)
        return found


def explore(output: Tensor) -> ReachedGraph:
    """Walks the graph below ``output`` once.

    Args:
        output: A tensor of any shape; without a graph it reaches nothing.

    Raises:
        UnsupportedModelError: A part of the graph is hidden in a reentrant checkpoint.
    """
    calls: dict[CallRecord, ReachedCall] = {}
    # A leaf may be a plain tensor; then no table of parameters knows it.
    leaves: set[Any] = {output} if output.is_leaf else set()
    stack: list[Node] = [] if output.grad_fn is None else [output.grad_fn]
    # Holding the nodes is part of the bookkeeping: their Python wrappers are made on demand, and
    # a wrapper that died could hand its id to another node.
    seen: set[Node] = set(stack)
    kinds: Counter[str] = Counter()
    consumers: dict[Node, list[Consumer]] = {}
    accumulators: dict[Any, Node] = {}
    while stack:
        node = stack.pop()
        kinds[type(node).__name__] += 1
        if type(node).__name__ == "AccumulateGrad":
            accumulators[node.variable] = node  # type: ignore[attr-defined]
            continue
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise UnsupportedModelError(
                "Found a reentrant activation checkpoint, which hides its parameters from the "
                "graph; expected torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        for mark in marks_of(node):
            calls.setdefault(mark.record, ReachedCall(mark.record)).add(mark, node)
        for position, (child, _) in enumerate(node.next_functions):
            if child is None:
                continue
            consumers.setdefault(child, []).append((node, position))
            if child not in seen:
                seen.add(child)
                stack.append(child)
    for call in calls.values():
        call.look_behind_broadcasts(consumers)
    leaves |= accumulators.keys()
    structure = frozenset(kinds.items())
    return ReachedGraph(list(calls.values()), leaves, structure, consumers, accumulators)
