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

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from jddist.distribution.lockstep import Lockstep, part_like

from .assembly import Assembly
from .blocks import DenseBlock, JacobianBlock, Scratch
from .differentiate import objectives_at_once, row_gradients
from .early import EarlyGramian
from .graph import ReachedCall, ReachedGraph, explore
from .layout import OutputLayout
from .parameters import Entry, Owner, ParameterTable
from .parts import of_parts, takes_parts
from .record import LayerRecord
from .rules.fallback import batched_leaves
from .self_check import Expected, check_alike, warn_direct, warn_wrong, wrong_entries
from .visits import visit

Blocks = list[JacobianBlock | None]


@dataclass(frozen=True, eq=False)
class _Run:
    """One output with its graph, its usable calls and the parameters that it depends on."""

    output: Tensor
    layout: OutputLayout
    graph: ReachedGraph
    calls: list[tuple[Owner, ReachedCall]]
    reached: set[int]


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
    _checked: bool = False
    _eps: float = 0.0
    _leaves: dict[int, Tensor] = field(default_factory=dict)
    _chunk: int = 1
    _index_of: dict[Tensor, int] = field(default_factory=dict)

    def blocks(
        self,
        output: Tensor,
        layout: OutputLayout,
        *,
        keep: bool = False,
        free: bool = False,
        early: EarlyGramian | None = None,
    ) -> Blocks:
        """One block per entry of the table; None where the rows are all zero.

        Args:
            output: The objectives, with their graph.
            layout: The layout of ``output``.
            keep: Whether the blocks may hold rows for ``combine`` until they are released.
            free: Whether the graph may be freed. It is if nothing is left to be done with it: it
                leads to the table's parameters alone, and its like has been checked.
            early: Where to count blocks as soon as they are known, if nobody needs their products
                otherwise. Blocks that are neither kept nor come from a freed graph are of no
                further use then.

        Raises:
            ModifiedInputError: An input of a recorded call was changed in place.
        """
        self.samples, self.freed, self.direct = 0, False, frozenset()
        self.lockstep.enter({"size": list(output.shape)})
        graph = self._explore(output)
        if layout.num_rows == 0:
            return [None] * len(self.table.entries)
        free = free and self.accounted and layout.objectives == 1
        blocks = self._checked_blocks(output, layout, graph, keep=keep, free=free, early=early)
        if self._checked:
            check_alike(output, layout, self.table.trainable, blocks, self._eps, self.lockstep)
        for entry in self.table.entries:
            if not self.lockstep.counts(entry.parameter):
                blocks[entry.index] = None  # another rank answers for it
        counted = set() if early is None else early.counted
        for index, block in enumerate(blocks):
            if block is not None and index not in counted:
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
        sizes = (math.prod(s) for call in graph.calls for s in call.record.output_shapes)
        widest = max(sizes, default=0) * output.element_size()
        # Collectives do not communicate under vmap.
        communicates = self.lockstep.active
        self._chunk = 1 if communicates else objectives_at_once(widest, output.device)
        return graph

    def _checked_blocks(
        self,
        output: Tensor,
        layout: OutputLayout,
        graph: ReachedGraph,
        *,
        keep: bool,
        free: bool,
        early: EarlyGramian | None,
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
        due = self._checked = self._is_due(signature)
        if due:
            elsewhere |= self._read_beside(graph, calls)
        start = (known or frozenset()) | (elsewhere & reached)
        self.freed = free and not due and known == frozenset() == start
        run = _Run(output, layout, graph, calls, reached)
        eps = self._eps = _coarsest_rounding(calls)
        expected = None
        if due:
            self.scratch.trim()  # a check needs memory of its own
        if early is not None:
            early.keep = keep or self.freed
            if due:
                entries = [self._entry(i) for i in sorted(reached - start)]
                leaves = [self._leaves[e.index] for e in entries]
                expected = Expected(output, layout, entries, leaves, eps=eps)
        blocks, direct, agree = self._compute(run, start, early, expected)
        self.direct = direct
        if due:
            wrong: frozenset[int] | None = frozenset()
            if not agree:
                if early is not None:  # counted too soon: once more, all blocks at once
                    early.restart()
                    blocks, direct, _ = self._compute(run, start, None, None)
                entries = [self._entry(i) for i in sorted(reached - direct)]
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
            lost = call.record.released or not call.record.is_repeatable
            if lost or (owner.rule is None and not self.batched):
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

    def _read_beside(
        self, graph: ReachedGraph, calls: Iterable[tuple[Owner, ReachedCall]]
    ) -> frozenset[int]:
        """The parameters that are also read without calling their modules, in however small a
        term of the objectives: one that is lost in the rounding that the check of values allows."""
        calls_of: dict[int, list[ReachedCall]] = {}
        for owner, call in calls:
            for parameter in owner.paths.values():
                calls_of.setdefault(self.table.index_of[parameter], []).append(call)
        return frozenset(
            index
            for index, own in calls_of.items()
            if graph.is_read_beside(self._leaves[index], own)
        )

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
        run: _Run,
        known_direct: frozenset[int],
        early: EarlyGramian | None,
        expected: Expected | None,
    ) -> tuple[Blocks, frozenset[int], bool]:
        """The blocks, which of the reached parameters had to be computed directly, and whether all
        blocks are known to be as ``expected``."""
        reached, calls = run.reached, run.calls
        recorded = {
            self.table.index_of[p] for owner, _ in calls for p in owner.paths.values()
        } & reached
        direct = (reached - recorded) | (known_direct & reached)
        wanted = reached - direct
        calls = [
            (owner, call)
            for owner, call in calls
            if any(self.table.index_of[p] in wanted for p in owner.paths.values())
        ]
        # Without a batch dimension every row is one pass anyway: take the parameters along.
        along = [] if self.batched else [self._leaves[i] for i in sorted(direct)]
        self.freed = self.freed and bool(calls) and not direct
        of_rank = self._of_rank if self.lockstep.active else None
        assembly = Assembly(self.table, self.batched, run.layout, calls, wanted, of_rank)
        blocks: Blocks = [None] * len(self.table.entries)
        agree = expected is not None and expected.is_finite

        def taken(position: int, grads: list[Tensor | None]) -> None:
            nonlocal agree
            with torch.no_grad():
                finished = assembly.take(position, grads)
                for index, block in finished:
                    blocks[index] = block
                    if expected is not None:
                        block.lend(self.scratch, keep=False)
                        agree = agree and expected.agrees(index, block)
                if early is not None:
                    early.add(finished)
            if self.freed and calls[position][0].rule is not None:
                calls[position][1].record.release()

        hooked = [i for i, (owner, _) in enumerate(calls) if owner.rule is not None]
        rows = visit(
            run.output,
            run.layout,
            run.graph,
            [call for _, call in calls],
            along,
            taken,
            chunk=self._chunk,
            retain_graph=not self.freed,
            early=[] if early is None else hooked,
        )
        for index, values in zip(sorted(direct), rows, strict=False):
            if values is not None:
                blocks[index] = self._dense(values, self._leaves[index])
        failed = assembly.failed
        self._fill_directly(run.output, run.layout, blocks, failed if along else direct | failed)
        if expected is not None and agree:
            for index in expected.remaining - failed:
                agree = agree and expected.agrees(index, blocks[index])
        return blocks, frozenset(direct | failed), agree

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
        found = row_gradients(output, layout, leaves, chunk=self._chunk)
        for entry, leaf, rows in zip(entries, leaves, found, strict=True):
            blocks[entry.index] = None if rows is None else self._dense(rows, leaf)

    def _dense(self, rows: Tensor, leaf: Tensor) -> JacobianBlock:
        """This rank's columns of rows [m, *shape]."""
        part = part_like(rows, leaf, rows=True)
        return DenseBlock(part.reshape(len(part), part.shape[1:].numel()))

    def _of_rank(self, owner: Owner, record: LayerRecord) -> LayerRecord:
        """What of a call belongs to this rank's columns."""
        return of_parts(record, self._leaves_of(owner))

    def _leaves_of(self, owner: Owner) -> dict[str, Tensor]:
        return {path: self._leaves[self.table.index_of[p]] for path, p in owner.paths.items()}

    def _warn_about(
        self, direct: frozenset[int], wrong: frozenset[int], *, had_calls: bool
    ) -> None:
        if direct:
            names = [self._entry(i).name for i in sorted(direct)]
            warn_direct(names, had_calls=had_calls, in_parts=self.lockstep.active)
        if wrong:
            warn_wrong([self._entry(i).name for i in sorted(wrong)])

    def _entry(self, index: int) -> Entry:
        return self.table.entries[index]


def _is_batched(owner: Owner, call: ReachedCall, batch: int) -> bool:
    """Whether dimension 0 of all the call's outputs counts the samples, as far as sizes tell."""
    if any(call.batch_of(index) != batch for index in call.edges):
        return False
    # A closed form takes the call apart by samples: a vector has none.
    shapes = [call.record.output_shapes[index] for index in call.edges]
    return owner.rule is None or all(len(s) > 1 for s in shapes)


def _coarsest_rounding(calls: list[tuple[Owner, ReachedCall]]) -> float:
    """The machine epsilon of the autocast dtype that some call ran in; 0 without autocast."""
    casts = [call.record.autocast for _, call in calls]
    return max((torch.finfo(cast.dtype).eps for cast in casts if cast.enabled), default=0.0)


def _samples_seen(calls: list[tuple[Owner, ReachedCall]]) -> int:
    """The batch size of the largest input of the calls: a guess that serves a warning only."""
    inputs = (leaf for _, call in calls for leaf, _ in call.record.watched if leaf.ndim > 1)
    return max((leaf.shape[0] for leaf in inputs), default=0)
