"""The first pass, call by call: each hands over its outputs' gradients once they are known.

Autograd holds the gradients that it is asked for until its pass has ended. Those of all layers
together take as much memory as the activations, so a call that lies above another one is visited by
hooks on its graph nodes instead, while the pass goes on; what it lets go of is freed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .differentiate import sample_gradients
from .graph import ReachedCall, ReachedGraph
from .layout import OutputLayout

# The position of a call, and the gradients [k, *shape] of those of its outputs that were reached.
Visitor = Callable[[int, list[Tensor | None]], None]


def visit(
    output: Tensor,
    layout: OutputLayout,
    graph: ReachedGraph,
    calls: Sequence[ReachedCall],
    along: Sequence[Tensor],
    visitor: Visitor,
    *,
    chunk: int,
    retain_graph: bool,
    early: Collection[int],
) -> list[Tensor | None]:
    """Differentiates the objectives at the outputs of calls.

    Args:
        output: The objectives.
        layout: The layout of ``output``.
        graph: The graph below it.
        calls: The calls.
        along: Further tensors at which gradients are wanted.
        visitor: Gets each call's gradients.
        chunk: How many objectives of a sample to differentiate in one pass.
        retain_graph: Whether to keep the graph.
        early: The positions of calls that may be visited while the pass still goes on, in the
            order in which it reaches them. All others are visited after it, in their order.

    Returns:
        The gradients at ``along``, as ``sample_gradients`` gives them.
    """
    now: set[int] = set()
    # Otherwise there are several passes, or one for several objectives at once.
    if early and layout.objectives == 1 and layout.batch_dim is not None:
        above = graph.above(edge.node for call in calls for edge in call.edges.values())
        # A pass that wants the gradients further down goes through these calls' nodes.
        now = {i for i in early if all(e.node in above for e in calls[i].edges.values())}
    later = [i for i in range(len(calls)) if i not in now]
    edges: list[Tensor | GradientEdge] = [e for i in later for e in calls[i].edges.values()]
    with _hooked({i: calls[i] for i in now}, visitor) as unfinished:
        found = sample_gradients(
            output, layout, [*edges, *along], chunk=chunk, retain_graph=retain_graph
        )
    rest = found[len(edges) :]
    del found[len(edges) :]
    found.reverse()  # so that each call's gradients can be let go of after its visit
    for i in later:
        unfinished[i] = [found.pop() for _ in calls[i].edges]
    for i in sorted(unfinished):
        visitor(i, unfinished.pop(i))
    return rest


@contextmanager
def _hooked(
    calls: dict[int, ReachedCall], visitor: Visitor
) -> Iterator[dict[int, list[Tensor | None]]]:
    """Within this context a pass lets the visitor see each call's gradients.

    Yields:
        The gradients of calls that were not visited, since not all of them have come.
    """
    waiting: dict[int, dict[int, Tensor | None]] = {i: {} for i in calls}
    unfinished: dict[int, list[Tensor | None]] = {}

    def arrived(i: int, index: int, gradient: Tensor | None) -> None:
        waiting[i][index] = None if gradient is None else gradient.unsqueeze(0)
        if len(waiting[i]) == len(calls[i].edges):
            known = waiting.pop(i)
            visitor(i, [known[index] for index in calls[i].edges])

    handles = []
    try:
        for node, places in _places(calls).items():

            def hook(
                gradients: tuple[Tensor | None, ...], at: list[tuple[int, int, int]] = places
            ) -> None:
                for i, index, output_nr in at:
                    arrived(i, index, gradients[output_nr])

            handles.append(node.register_prehook(hook))
        yield unfinished
    finally:
        for handle in handles:
            handle.remove()
    for i, known in waiting.items():
        unfinished[i] = [known.get(index) for index in calls[i].edges]


def _places(calls: dict[int, ReachedCall]) -> dict[Node, list[tuple[int, int, int]]]:
    """For each node whose gradients are wanted: call, index of its output, output of the node."""
    places: dict[Node, list[tuple[int, int, int]]] = {}
    for i, call in calls.items():
        for index, edge in call.edges.items():
            places.setdefault(edge.node, []).append((i, index, edge.output_nr))
    return places
