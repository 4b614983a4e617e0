"""This rank's part of the Jacobian: from an output's graph to one block of rows per parameter.

Three ways lead to a parameter's rows, tried in this order:
closed form
    a registered rule on the recorded inputs and the gradients of the outputs;
fallback
    a vmapped re-run of the module, for any module with a batch dimension;
direct
    one backward pass per objective down to the parameter itself: always right, and slow. It serves
    modules whose outputs are not batched, and parameters read without calling their module.

The first time that a graph of some structure is seen, the blocks are checked: a random combination
of their rows has to be the gradient that autograd gives. What fails is computed directly from then
on, with a warning: slow, but never silently wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.parameter import Parameter
from torch.utils._pytree import tree_map

from jddist.distribution.lockstep import Lockstep, part_like

from .blocks import DenseBlock, JacobianBlock, Scratch, sum_blocks
from .differentiate import row_gradients, sample_gradients
from .graph import ReachedCall, ReachedGraph, explore
from .layout import OutputLayout
from .parameters import Entry, Owner, ParameterTable
from .parts import of_parts, takes_parts
from .record import LayerRecord
from .rules.fallback import batched_leaves, vjp_rows
from .self_check import warn_direct, warn_wrong, wrong_entries

Blocks = list[JacobianBlock | None]


class _Declined(Exception):
    """A rule does not serve a call, and without a batch dimension the fallback cannot either."""


@dataclass(eq=False)
class LocalPass:
    """Computes blocks of rows, and remembers which parameters have to be computed directly.

    Args:
        table: The engine's parameters and owners.
        batched: Whether the engine has a batch dimension.
        scratch: The memory in which the blocks work.
        find_leaves: Which tensor stands for a parameter in the graph, where it is another one.
        lockstep: The ranks that have to take every pass together with this one.

    Attributes:
        samples: The batch size that the modules saw in the last pass, as far as can be told.
        accounted: Whether the last graph led to no other leaves than the table's parameters.
        freed: Whether the last pass freed the graph.
        direct: The parameters whose rows the last pass computed directly.
    """

    table: ParameterTable
    batched: bool
    scratch: Scratch = field(default_factory=Scratch)
    find_leaves: Callable[[], Mapping[Parameter, Tensor]] = dict
    lockstep: Lockstep = field(default_factory=Lockstep)
    samples: int = 0
    accounted: bool = False
    freed: bool = False
    direct: frozenset[int] = frozenset()
    _direct: dict[Hashable, frozenset[int]] = field(default_factory=dict)
    _steps: dict[Hashable, int] = field(default_factory=dict)
    _leaves: dict[int, Tensor] = field(default_factory=dict)
    _index_of: dict[Tensor, int] = field(default_factory=dict)

    def blocks(
        self, output: Tensor, layout: OutputLayout, *, keep: bool = False, free: bool = False
    ) -> Blocks:
        """One block per entry of the table; None where the rows are all zero.

        Args:
            output: The objectives, with their graph.
            layout: The layout of ``output``.
            keep: Whether the blocks may hold rows for ``combine`` until they are released.
            free: Whether the graph may be freed. It is if nothing is left to be done with it: it
                leads to the table's parameters alone, and its like has been checked.

        Raises:
            ModifiedInputError: An input of a recorded call was changed in place.
        """
        self.samples, self.freed, self.direct = 0, False, frozenset()
        self.lockstep.enter({"shape of the objectives": list(output.shape)})
        graph = self._explore(output)
        if layout.num_rows == 0:
            return [None] * len(self.table.entries)
        free = free and self.accounted and layout.objectives == 1
        blocks = self._checked_blocks(output, layout, graph, free)
        for entry in self.table.entries:
            if not self.lockstep.counts(entry.parameter):
                blocks[entry.index] = None  # another rank answers for it
        for block in blocks:
            if block is not None:
                block.lend(self.scratch, keep=keep or self.freed)
        if self.freed:
            for call in graph.calls:
                call.record.release()
        return blocks

    def reached(self, output: Tensor) -> list[str]:
        """The names of the parameters that ``output`` depends on; no rows are computed."""
        graph = self._explore(output)
        known = [(self.table.owner_of.get(call.record.module), call) for call in graph.calls]
        self.samples = _samples_seen([(owner, call) for owner, call in known if owner is not None])
        self.freed = False
        return sorted(
            self._entry(i).name for leaf, i in self._index_of.items() if leaf in graph.leaves
        )

    def _explore(self, output: Tensor) -> ReachedGraph:
        graph = explore(output)
        found = self.find_leaves()
        self._leaves = {e.index: found.get(e.parameter, e.parameter) for e in self.table.entries}
        self._index_of = {leaf: index for index, leaf in self._leaves.items()}
        self.accounted = graph.leaves <= self._index_of.keys()
        return graph

    def _checked_blocks(
        self, output: Tensor, layout: OutputLayout, graph: ReachedGraph, free: bool
    ) -> Blocks:
        reached = {
            self._index_of[leaf]
            for leaf in graph.leaves
            if leaf in self._index_of and leaf.requires_grad
        }
        calls, elsewhere = self._usable_calls(graph.calls, layout)
        self.samples = _samples_seen(calls)
        signature = (self._signature(calls, reached, layout), graph.structure)
        known = self._direct.get(signature)
        start = (known or frozenset()) | (elsewhere & reached)
        due = self._is_due(signature)
        self.freed = free and not due and known == frozenset() == start
        blocks, direct = self._compute(output, layout, calls, reached, start)
        self.direct = direct
        if due:
            entries = [self._entry(i) for i in sorted(reached - direct)]
            eps = _coarsest_rounding(calls)
            leaves = [self._leaves[e.index] for e in entries]
            wrong = wrong_entries(output, layout, entries, leaves, blocks, eps, self.lockstep)
            if wrong is None:
                self._steps[signature] -= 1
                return blocks  # NaN proves nothing: check again next time
            if self.batched:  # without a batch dimension the direct way is the usual one
                news = direct if known is None else frozenset[int]()
                self._warn_about(news, wrong, had_calls=bool(graph.calls))
            self._direct[signature] = self.direct = direct | wrong
            self._fill_directly(output, layout, blocks, wrong)
        return blocks

    def _is_due(self, signature: Hashable) -> bool:
        """Whether to check at this step: the 1st, 2nd, 4th, 8th, ... of each structure.

        Once is not enough: a gradient may be zero at first (a head initialised to zero), and the
        values that decide who is mixed with whom are no part of the structure.
        """
        self._steps[signature] = step = self._steps.get(signature, 0) + 1
        return step & (step - 1) == 0

    def _usable_calls(
        self, calls: Iterable[ReachedCall], layout: OutputLayout
    ) -> tuple[list[tuple[Owner, ReachedCall]], frozenset[int]]:
        """The calls from which rows can be built, and the parameters that others read as well."""
        usable = []
        elsewhere: set[int] = set()
        for call in calls:
            owner = self.table.owner_of.get(call.record.module)
            if owner is None:
                continue
            indices = {self.table.index_of[p] for p in owner.paths.values()}
            if call.record.released or (owner.rule is None and not self.batched):
                elsewhere |= indices
                continue
            if self.lockstep.active and not takes_parts(owner, self._leaves_of(owner)):
                elsewhere |= indices
                continue
            if self.batched and not _is_batched(owner, call, layout.batch):
                elsewhere |= indices
                continue
            call.record.check_unmodified(owner.name)
            usable.append((owner, call))
        return usable, frozenset(elsewhere)

    def _signature(
        self,
        calls: list[tuple[Owner, ReachedCall]],
        reached: set[int],
        layout: OutputLayout,
    ) -> Hashable:
        """All that decides how rows are attributed, sizes of the batch and of positions aside."""
        described = sorted(
            (
                self.table.index_of_owner[owner],
                tuple(sorted(call.edges)),
                call.record.training,
                batched_leaves(call.record, layout.batch) if self.batched else (),
            )
            for owner, call in calls
        )
        return (tuple(described), frozenset(reached), layout.batch == 1, layout.objectives == 1)

    def _compute(
        self,
        output: Tensor,
        layout: OutputLayout,
        calls: list[tuple[Owner, ReachedCall]],
        reached: set[int],
        known_direct: frozenset[int],
    ) -> tuple[Blocks, frozenset[int]]:
        """The blocks, and which of the reached parameters had to be computed directly."""
        recorded = {
            self.table.index_of[p] for owner, _ in calls for p in owner.paths.values()
        } & reached
        direct = (reached - recorded) | (known_direct & reached)
        calls = [
            (owner, call)
            for owner, call in calls
            if any(self.table.index_of[p] in reached - direct for p in owner.paths.values())
        ]
        edges: list[Tensor | GradientEdge] = []
        for _, call in calls:
            edges.extend(call.edges.values())
        # Without a batch dimension every row is one pass anyway: take the parameters along.
        along = [] if self.batched else [self._leaves[i] for i in sorted(direct)]
        self.freed = self.freed and bool(edges) and not direct
        grads = iter(
            sample_gradients(
                output,
                layout,
                [*edges, *along],
                retain_graph=not self.freed,
                by_vmap=not self.lockstep.active,
            )
        )
        parts: dict[int, list[JacobianBlock]] = {}
        failed: set[int] = set()
        for owner, call in calls:
            call_grads = [next(grads) for _ in call.edges]
            try:
                with torch.no_grad():
                    self._run_rule(owner, call, call_grads, layout, reached - direct, parts)
            except _Declined:
                failed |= {self.table.index_of[p] for p in owner.paths.values()} & reached
            except RuntimeError as error:
                if owner.rule is not None:
                    raise
                warnings.warn(
                    f"Module '{owner.name}' ({type(owner.module).__name__}) cannot be re-run under "
                    f"vmap ({str(error).splitlines()[0]}); its parameters' rows are computed by "
                    "one backward pass per objective. Register a rule for it "
                    "(jddist.autogram.register_rule) or use batch_dim=None.",
                    stacklevel=2,
                )
                failed |= {self.table.index_of[p] for p in owner.paths.values()} & reached
        blocks: Blocks = [None] * len(self.table.entries)
        for index, pieces in parts.items():
            if index not in failed:
                blocks[index] = sum_blocks(pieces)
        for index in sorted(direct) if along else ():
            rows = next(grads)
            if rows is not None:
                blocks[index] = self._dense(rows, self._leaves[index])
        self._fill_directly(output, layout, blocks, failed if along else direct | failed)
        return blocks, frozenset(direct | failed)

    def _run_rule(
        self,
        owner: Owner,
        call: ReachedCall,
        call_grads: list[Tensor | None],
        layout: OutputLayout,
        wanted: set[int],
        parts: dict[int, list[JacobianBlock]],
    ) -> None:
        """Appends the blocks of one call to ``parts``."""
        by_output = dict(zip(call.edges, call_grads, strict=True))
        if all(g is None for g in call_grads):
            return
        grads: list[Tensor | None] = []
        for index in range(len(call.record.output_shapes)):
            g = by_output.get(index)
            if g is not None:
                g = call.output_gradient(index, g)
                g = g if self.batched else g.unsqueeze(1)
            grads.append(g)
        args, kwargs = call.record.args, call.record.kwargs
        if call.broadcast and owner.rule is not None:
            args, kwargs = _broadcast((args, kwargs), next(iter(call.broadcast.values())))
        record = LayerRecord(
            call.record.module, args, kwargs, grads, call.record, layout.batch, self.batched
        )
        if self.lockstep.active:
            record = of_parts(record, self._leaves_of(owner))
        found = None if owner.rule is None else owner.rule(record)
        if found is None:
            if not self.batched:
                raise _Declined
            paths = [p for p, q in owner.paths.items() if self.table.index_of[q] in wanted]
            found = vjp_rows(record, paths)
        for path, block in found.items():
            index = self.table.index_of[owner.paths[path]]
            if index in wanted and block.num_columns:  # a shard may be empty
                assert block.num_rows == layout.num_rows
                parts.setdefault(index, []).append(block)

    def _fill_directly(
        self, output: Tensor, layout: OutputLayout, blocks: Blocks, indices: Iterable[int]
    ) -> None:
        entries = [self._entry(i) for i in sorted(indices)]
        if entries and self.freed:
            raise RuntimeError(
                f"Found no way to the rows of {', '.join(e.name for e in entries)} in a graph that "
                "is freed already; expected the fallback to serve as it did before. Call "
                "engine.backward(..., retain_graph=True), or compute_gramian and a backward."
            )
        leaves = [self._leaves[e.index] for e in entries]
        found = row_gradients(output, layout, leaves, by_vmap=not self.lockstep.active)
        for entry, leaf, rows in zip(entries, leaves, found, strict=True):
            blocks[entry.index] = None if rows is None else self._dense(rows, leaf)

    def _dense(self, rows: Tensor, leaf: Tensor) -> JacobianBlock:
        """This rank's columns of rows [m, *shape]."""
        part = part_like(rows, leaf, rows=True)
        return DenseBlock(part.reshape(len(part), part.shape[1:].numel()))

    def _warn_about(
        self, direct: frozenset[int], wrong: frozenset[int], *, had_calls: bool
    ) -> None:
        if direct:
            names = [self._entry(i).name for i in sorted(direct)]
            warn_direct(names, had_calls=had_calls, in_parts=self.lockstep.active)
        if wrong:
            warn_wrong([self._entry(i).name for i in sorted(wrong)])

    def _leaves_of(self, owner: Owner) -> dict[str, Tensor]:
        return {path: self._leaves[self.table.index_of[p]] for path, p in owner.paths.items()}

    def _entry(self, index: int) -> Entry:
        return self.table.entries[index]


def _is_batched(owner: Owner, call: ReachedCall, batch: int) -> bool:
    """Whether dimension 0 of all the call's outputs counts the samples, as far as sizes tell."""
    if any(call.batch_of(index) != batch for index in call.edges):
        return False
    # A closed form takes the call apart by samples: a vector has none.
    shapes = [call.record.output_shapes[index] for index in call.edges]
    return owner.rule is None or all(len(s) > 1 for s in shapes)


def _broadcast(inputs: Any, batch: int) -> Any:
    """Inputs of batch 1 as if the call had been made with the batch."""

    def expand(leaf: Any) -> Any:
        single = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == 1
        return leaf.expand(batch, *leaf.shape[1:]) if single else leaf

    return tree_map(expand, inputs)


def _coarsest_rounding(calls: list[tuple[Owner, ReachedCall]]) -> float:
    """The machine epsilon of the autocast dtype that some call ran in; 0 without autocast."""
    casts = [call.record.autocast for _, call in calls]
    return max((torch.finfo(cast.dtype).eps for cast in casts if cast.enabled), default=0.0)


def _samples_seen(calls: list[tuple[Owner, ReachedCall]]) -> int:
    """The batch size of the largest input of the calls: a guess that serves a warning only."""
    inputs = (leaf for _, call in calls for leaf, _ in call.record.watched if leaf.ndim > 1)
    return max((leaf.shape[0] for leaf in inputs), default=0)
