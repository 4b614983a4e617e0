"""From this rank's blocks to the Gramian of all ranks, by way of what the ranks told each other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Placement

from jddist._progress import enter
from jddist.distribution.base import Distribution, is_average, is_sharded
from jddist.distribution.counts import shares_of_samples
from jddist.distribution.exchange import (
    describe,
    local_gramian,
    sharded_rows_gramian,
    summed_rows_gramian,
)
from jddist.distribution.planning import Plan, Prefer, plan, plan_sums
from jddist.distribution.schemes import BlockShape
from jddist.distribution.triangle import pack_lower, unpack_symmetric
from jddist.distribution.whole import shape_of
from jddist.errors import NonFiniteObjectiveError

from .blocks.products import mirror_
from .early import EarlyGramian
from .layout import OutputLayout
from .local_pass import Blocks
from .parameters import ParameterTable

_OF_SHAPES = [field.name for field in fields(BlockShape)]


@dataclass(frozen=True)
class GlobalLayout:
    """How this rank's objectives lie among those of all ranks.

    Attributes:
        local: The layout of this rank's output.
        whole: The layout of all objectives.
        sharded: Whether the ranks have objectives of their own.
        sizes: Each rank's size of the sharded dimension (of no meaning if not ``sharded``).
        rank: This rank.
        row_scale: For estimates of the same objectives: by what this rank's rows are multiplied
            before they are summed over ranks, one number per objective.
        backward_scale: The same for the weights of this rank's objectives, which the wrapper
            averages over ranks.
        shapes: What each rank has for each parameter.
        rows_finite: If the blocks are columns of the global rows already: whether this rank's part
            of each row was finite before it was reduced.
    """

    local: OutputLayout
    whole: OutputLayout
    sharded: bool
    sizes: tuple[int, ...]
    rank: int
    row_scale: tuple[float, ...]
    backward_scale: tuple[float, ...]
    shapes: tuple[tuple[BlockShape, ...], ...]
    rows_finite: tuple[bool, ...] | None = None

    @staticmethod
    def of(
        local: OutputLayout, infos: Sequence[Mapping[str, Any]], rank: int, placement: Placement
    ) -> GlobalLayout:
        """The layout that follows from every rank's information."""
        sharded = is_sharded(placement)
        sizes = tuple(int(info["size"]) for info in infos)
        whole = local
        if sharded and local.shape:
            whole = local.resized(sum(sizes))
        shares = shares_of_samples([info["count"] for info in infos], local.num_rows)[rank]
        # The sum over ranks of share * rows / W is the global row; the wrapper averages likewise.
        average = is_average(placement)
        row_scale = tuple(s / len(infos) if average else 1.0 for s in shares)
        shapes = tuple(tuple(BlockShape(*s) for s in info["shapes"]) for info in infos)
        scale = tuple(s if average else 1.0 for s in shares)
        return GlobalLayout(local, whole, sharded, sizes, rank, row_scale, scale, shapes)

    @property
    def objectives(self) -> int:
        """The number of objectives for each entry of the sharded dimension."""
        return self.whole.num_rows // max(1, sum(self.sizes))

    def has_rows(self, index: int) -> bool:
        """Whether any rank has rows for a parameter."""
        return any(of_rank[index].kind != "none" for of_rank in self.shapes)

    def local_part(self, weights: Tensor) -> Tensor:
        """This rank's slice of global weights, times its share of the samples."""
        if tuple(weights.shape) != self.whole.shape:
            raise ValueError(
                f"Found weights of shape {tuple(weights.shape)}; expected {self.whole.shape}, one "
                "weight for each objective of all ranks."
            )
        if self.sharded:
            if not self.local.shape:
                return weights
            start = sum(self.sizes[: self.rank])
            return weights.narrow(self.local.sharded_dim, start, self.sizes[self.rank])
        scale = weights.new_tensor(self.backward_scale)
        return self.local.shaped(self.local.rows_of(weights) * scale)


@dataclass(frozen=True)
class GramianParts:
    """The global Gramian [m, m], with flags of the objectives that are not finite: [1, m] if every
    rank has its own, else [W, m]: which rank's estimate is to blame. ``plan`` is
    how it was exchanged, None in one process."""

    values: Tensor
    flags: Tensor
    plan: Plan | None = None

    @property
    def finite(self) -> bool:
        """Whether all objectives and their gradients are finite."""
        return not bool(self.flags.any())


def must_agree(
    table: ParameterTable,
    outputs: Sequence[Tensor],
    layouts: Sequence[OutputLayout],
    placement: Placement,
    has_count: bool,
) -> dict[str, Any]:
    """What has to be the same on every rank, of the objectives of one or several batches."""
    shapes = []
    for layout in layouts:
        shape = [str(s) for s in layout.shape]
        if is_sharded(placement) and shape:
            shape[layout.sharded_dim] = "*"
        shapes.append(f"[{', '.join(shape)}]")
    described = [
        f"{e.name}:{tuple(shape_of(e.parameter))}:{e.parameter.dtype}" for e in table.trainable
    ]
    digest = hashlib.blake2b("\n".join(described).encode(), digest_size=8).hexdigest()
    return {
        "shape of the objectives": ", ".join(shapes),
        "dtype of the objectives": ", ".join(str(output.dtype) for output in outputs),
        "batch_dim": layouts[0].batch_dim,
        "placement of the objectives": repr(placement),
        "trainable parameters": f"{len(described)} with digest {digest}",
        "whether count is given": has_count,
    }


def to_tell(
    blocks: Blocks, layout: OutputLayout, counts: list[float] | None, samples: int
) -> dict[str, Any]:
    """What the other ranks need to know of this one.

    Args:
        blocks: Its blocks of rows.
        layout: The layout of its output.
        counts: Its samples per objective, if given.
        samples: The batch size that its modules saw.
    """
    shapes = describe(blocks, factors=layout.batch_dim is not None)
    return {
        "size": layout.size,
        "samples": samples,
        "count": counts,
        "shapes": [[getattr(shape, name) for name in _OF_SHAPES] for shape in shapes],
    }


def gramian(
    distribution: Distribution,
    layout: GlobalLayout,
    blocks: Blocks,
    output: Tensor,
    table: ParameterTable,
    prefer: Prefer = "bytes",
    early: EarlyGramian | None = None,
) -> GramianParts:
    """The global Gramian in the engine's order of rows.

    Args:
        distribution: The ranks.
        layout: The layout of the objectives.
        blocks: This rank's blocks of rows.
        output: Its objectives.
        table: The parameters.
        prefer: How exchanges are chosen.
        early: What was counted already, in one process.
    """
    enter("exchange")
    group, everyone, device = distribution.group, distribution.everyone, output.device
    dtype = _travelling_dtype(output, table)
    finite = torch.isfinite(layout.local.rows_of(output.detach()))
    m = layout.whole.num_rows
    scale = torch.tensor(layout.row_scale, dtype=torch.float64, device=device)
    exchange = plan_of(distribution, layout, output, table, prefer)
    flags = torch.zeros(group.size, m, dtype=torch.float64, device=device)
    if group.size == 1:
        if early is None:
            values = local_gramian(blocks, m, device)
        else:
            values = mirror_(early.complete(blocks))
        dropped = scale == 0
        if 0.0 in layout.row_scale:
            values = values.masked_fill(dropped.unsqueeze(0) | dropped.unsqueeze(1), 0.0)
        flags[0] = (~finite | ~torch.isfinite(values.diagonal())) & ~dropped
        if everyone.size == 1:
            return GramianParts(values, flags > 0)
    elif layout.sharded:
        assert exchange is not None
        k = layout.objectives
        values = sharded_rows_gramian(blocks, exchange, group, layout.sizes, k, dtype, device)
        flags = flags[:1]
        start = k * sum(layout.sizes[: group.rank])
        flags[0, start : start + len(finite)] = (~finite).double()
    elif layout.rows_finite is not None:
        # Replicas have the same columns: what is summed over all ranks below counts them all.
        replicas = everyone.size // distribution.columns.group.size
        values = local_gramian(blocks, m, device) / replicas
        rows_finite = torch.tensor(layout.rows_finite, device=device)
        flags[group.rank] = (~(finite & rows_finite) & (scale != 0)).double()
    else:
        assert exchange is not None
        values, rows_finite = summed_rows_gramian(blocks, exchange, scale, group, dtype, device)
        flags[group.rank] = (~(finite & rows_finite) & (scale != 0)).double()
    # One buffer: half of the Gramian and the flags, in one collective.
    half = m * (m + 1) // 2
    buffer = group.buffers.take(half + flags.numel(), values.dtype, device)
    pack_lower(values, out=buffer[:half])
    buffer[half:] = flags.view(-1)
    if layout.sharded and group.size > 1:
        group.buffers.give_back(values)
    everyone.all_reduce(buffer)
    values = unpack_symmetric(buffer[:half], m)
    flags = buffer[half:].view(flags.shape) > 0
    group.buffers.give_back(buffer)
    if layout.sharded:
        flags = flags | _not_finite(values)
    return GramianParts(values, flags, exchange)


def _not_finite(values: Tensor) -> Tensor:
    """Which objectives are to blame for a Gramian [m, m] that is not finite: [m].

    Products of finite rows are finite, but for what an exchange made of them.
    """
    # A row with such an element has such a sum; to sum is far faster than to look at each.
    bad = ~torch.isfinite(values.sum(dim=1))
    rows = ~torch.isfinite(values.diagonal())
    return rows | (bad & ~rows.any())


def plan_of(
    distribution: Distribution,
    layout: GlobalLayout,
    output: Tensor,
    table: ParameterTable,
    prefer: Prefer,
) -> Plan | None:
    """The exchange of all ranks' blocks, or None in one process."""
    group, everyone = distribution.group, distribution.everyone
    if everyone.size == 1:
        return None
    columns = [distribution.lockstep.numel(e.parameter) for e in table.entries]
    itemsize = _travelling_dtype(output, table).itemsize
    found = planned(layout, columns, group.size, itemsize, prefer)
    return replace(found, everyone=everyone.size) if everyone.size > group.size else found


def _travelling_dtype(output: Tensor, table: ParameterTable) -> torch.dtype:
    dtype = torch.promote_types(output.dtype, torch.float32)
    for entry in table.entries:
        dtype = torch.promote_types(dtype, entry.parameter.dtype)
    return dtype


def planned(
    layout: GlobalLayout, columns: Sequence[int], size: int, itemsize: int, prefer: Prefer
) -> Plan:
    """The exchange of all ranks' blocks."""
    if layout.sharded:
        k = layout.objectives
        return _plan(layout.shapes, tuple(columns), layout.sizes, k, itemsize, prefer)
    # Parameters that no rank has rows for (frozen ones, say) need not travel.
    needed = [i for i in range(len(columns)) if layout.has_rows(i)]
    return plan_sums(needed, columns, layout.whole.num_rows, size, itemsize=itemsize)


@lru_cache(maxsize=64)
def _plan(
    shapes: tuple[tuple[BlockShape, ...], ...],
    columns: tuple[int, ...],
    batches: tuple[int, ...],
    objectives: int,
    itemsize: int,
    prefer: Prefer,
) -> Plan:
    """Most steps are like the one before."""
    return plan(shapes, columns, batches, objectives, itemsize=itemsize, prefer=prefer)


def nonfinite_error(
    layout: GlobalLayout,
    parts: GramianParts,
    spread: tuple[int, Mapping[int, Sequence[str]]] | None,
) -> NonFiniteObjectiveError:
    """The error that names the ranks and objectives that are not finite.

    Args:
        layout: The layout of the objectives.
        parts: The Gramian with its flags.
        spread: An earlier step from whose gradients this follows, with the parameters of each rank
            that brought NaN or infinity to it; None if there was none.
    """
    places = []
    for row in parts.flags.nonzero().tolist():
        owner, objective = row
        if layout.sharded:
            sample, owner = objective // layout.objectives, 0
            while sample >= layout.sizes[owner]:
                sample -= layout.sizes[owner]
                owner += 1
        places.append(f"objective {layout.whole.index_of(objective)} (rank {owner})")
    before = ""
    if spread is not None:
        step, by_rank = spread
        listed = "; ".join(
            f"rank {rank}, whose own gradient was not finite in step {step}, backward (of "
            f"{_listed(names, 3)})"
            for rank, names in by_rank.items()
        )
        before = f"It came from {listed}: the reduction over ranks spread it. "
    return NonFiniteObjectiveError(
        f"Found NaN or infinity in {_listed(places, 8)}, or in its gradient; expected finite "
        f"objectives. {before}No .grad was written. Lower the learning rate, look at that rank's "
        "data, or create the engine with nonfinite='skip'."
    )


def _listed(parts: Sequence[str], most: int) -> str:
    return ", ".join(parts[:most]) + (", ..." if len(parts) > most else "")
