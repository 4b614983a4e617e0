"""From the gradients at single calls to one block of rows per parameter."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from .blocks import JacobianBlock, sum_blocks
from .graph import ReachedCall
from .layout import OutputLayout
from .parameters import Owner, ParameterTable
from .record import LayerRecord
from .rules.fallback import vjp_rows

# A parameter's index and the block of all its rows.
Finished = list[tuple[int, JacobianBlock]]


class Declined(Exception):
    """A rule does not serve a call, and without a batch dimension the fallback cannot either."""


class _NotRepeatable(Exception):
    """A module's forward cannot be run again, sample by sample."""


@dataclass(eq=False)
class Assembly:
    """Runs the rules of calls, and adds up what several calls give for one parameter.

    Args:
        table: The engine's parameters and owners.
        batched: Whether the engine has a batch dimension.
        layout: The layout of the objectives.
        calls: The calls, each with the module that it is a call of.
        wanted: The indices of the parameters whose rows are wanted.
        of_rank: What of a call belongs to this rank, where it has but some columns.

    Attributes:
        failed: The parameters whose rows cannot be had from their calls.
    """

    table: ParameterTable
    batched: bool
    layout: OutputLayout
    calls: Sequence[tuple[Owner, ReachedCall]]
    wanted: Collection[int]
    of_rank: Callable[[Owner, LayerRecord], LayerRecord] | None = None
    failed: set[int] = field(default_factory=set)
    _parts: dict[int, list[JacobianBlock]] = field(default_factory=dict)
    _to_come: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for owner, _ in self.calls:
            self._to_come.update(self._indices(owner))

    def take(self, position: int, grads: Sequence[Tensor | None]) -> Finished:
        """The blocks of those parameters of which this was the last call.

        Args:
            position: Which call it is.
            grads: The gradients of its outputs that were reached, [k, *shape] each.

        Raises:
            ValueError, RuntimeError: What a closed form raises.
        """
        owner, call = self.calls[position]
        indices = self._indices(owner)
        try:
            self._run_rule(owner, call, grads)
        except Declined:
            self.failed |= indices
        except _NotRepeatable as failure:
            (reason,) = failure.args
            warnings.warn(
                f"Module '{owner.name}' ({type(owner.module).__name__}) cannot be re-run under "
                f"vmap ({reason}); its parameters' rows are computed by one backward pass per "
                "objective. Register a rule for it (jddist.autogram.register_rule) or use "
                "batch_dim=None.",
                stacklevel=2,
            )
            self.failed |= indices
        finished: Finished = []
        for index in sorted(indices):
            self._to_come[index] -= 1
            if self._to_come[index] == 0 and index not in self.failed:
                parts = self._parts.pop(index, None)
                if parts:
                    finished.append((index, sum_blocks(parts)))
        return finished

    def _indices(self, owner: Owner) -> set[int]:
        return {self.table.index_of[p] for p in owner.paths.values()} & set(self.wanted)

    def _run_rule(self, owner: Owner, call: ReachedCall, found: Sequence[Tensor | None]) -> None:
        """Adds the blocks of one call to the parts of their parameters."""
        if all(g is None for g in found):
            return
        by_output = dict(zip(call.edges, found, strict=True))
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
            call.record.module, args, kwargs, grads, call.record, self.layout.batch, self.batched
        )
        if self.of_rank is not None:
            record = self.of_rank(owner, record)
        blocks = None if owner.rule is None else owner.rule(record)
        if blocks is None:
            if not self.batched:
                raise Declined
            paths = [p for p, q in owner.paths.items() if self.table.index_of[q] in self.wanted]
            try:
                blocks = vjp_rows(record, paths)
            except Exception as error:  # whatever the module's own code raises
                raise _NotRepeatable(str(error).partition("\n")[0]) from error
        for path, block in blocks.items():
            index = self.table.index_of[owner.paths[path]]
            if index in self.wanted and block.num_columns:  # a shard may be empty
                assert block.num_rows == self.layout.num_rows
                self._parts.setdefault(index, []).append(block)


def _broadcast(inputs: Any, batch: int) -> Any:
    """Inputs of batch 1 as if the call had been made with the batch."""

    def expand(leaf: Any) -> Any:
        single = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == 1
        return leaf.expand(batch, *leaf.shape[1:]) if single else leaf

    return tree_map(expand, inputs)
