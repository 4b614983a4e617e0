"""What the last step did with each layer: the table behind ``Engine.explain``.

Numbers are predictions from shapes: of the operations of a step from the layer's factors on, of the
bytes that this rank sends, and of the memory that the layer takes meanwhile. Where several layers
share a message, each counts with its share of the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jddist.distribution.planning import Plan, plan
from jddist.distribution.schemes import BlockShape, Scheme, forming_flops
from jddist.distribution.whole import numel_of

from .blocks.cost import materialised_flops, pairwise_flops
from .parameters import Owner, ParameterTable


@dataclass(frozen=True)
class Taken:
    """What has to be remembered of a step to explain it; no tensor is among it.

    Attributes:
        shapes: This rank's block for each parameter.
        batch: This rank's samples b.
        objectives: The objectives of each sample k.
        direct: The parameters whose rows were computed by backward passes of their own.
        rank: This rank.
        plan: The exchange, or None in one process.
        itemsize: Bytes of a number.
        tile: Numbers of a tile of scratch memory.
        columns: The number of each parameter's columns that this rank computes with; by default
            all of them.
    """

    shapes: tuple[BlockShape, ...]
    batch: int
    objectives: int
    direct: frozenset[int]
    rank: int
    plan: Plan | None
    itemsize: int
    tile: int
    columns: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerReport:
    """One row of the table.

    Attributes:
        name: The module's name.
        type: Its class.
        rule: The closed form's name, or "fallback".
        form: How products of rows are computed: "pairwise" (never forming them), "materialised",
            "lookup", "rows" (the closed form gives them), "fallback" (a vmapped re-run gives them),
            "direct" (a backward pass per objective) or "none" (no rows).
        exchange: The scheme of exchange, "" in one process.
        flops: Operations of this rank.
        bytes_sent: Bytes that this rank sends.
        memory: Bytes of its factors or rows and of what is made of them.
    """

    name: str
    type: str
    rule: str
    form: str
    exchange: str
    flops: float
    bytes_sent: float
    memory: float


def reports(table: ParameterTable, taken: Taken) -> list[LayerReport]:
    """One row for each module with parameters of its own, in the model's order.

    A parameter that several modules share counts with the first of them.
    """
    columns = taken.columns or [numel_of(entry.parameter) for entry in table.entries]
    exchange = taken.plan
    if exchange is None:
        local = [taken.shapes]
        itemsize = taken.itemsize
        exchange = plan(local, columns, [taken.batch], taken.objectives, itemsize=itemsize)
    found, counted = [], set[int]()
    for owner in table.owners:
        indices = [table.index_of[p] for p in owner.paths.values()]
        new = [i for i in dict.fromkeys(indices) if i not in counted]
        counted.update(new)
        found.append(_report(owner, indices, new, columns, taken, exchange))
    return found


def as_text(rows: Sequence[LayerReport], taken: Taken) -> str:
    """The table, with a line of sums."""
    head = ("layer", "type", "rule", "form", "exchange", "FLOPs", "bytes sent", "memory")
    cells = [
        (r.name or "(root)", r.type, r.rule, r.form, r.exchange)
        + tuple(f"{n:.3g}" for n in (r.flops, r.bytes_sent, r.memory))
        for r in rows
    ]
    sums = [sum(getattr(r, name) for r in rows) for name in ("flops", "bytes_sent", "memory")]
    if taken.plan is not None:
        sent = taken.plan.gramian_bytes
        cells.append(("Gramian", "", "", "", "sum", "", f"{sent:.3g}", ""))
        sums[1] += sent
    cells.append(("all", "", "", "", "", *(f"{n:.3g}" for n in sums)))
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    lines = []
    for line in [head, *cells]:
        texts = [f"{c:<{w}}" for c, w in zip(line[:5], widths[:5], strict=True)]
        numbers = [f"{c:>{w}}" for c, w in zip(line[5:], widths[5:], strict=True)]
        lines.append("  ".join([*texts, *numbers]).rstrip())
    size = 1 if taken.plan is None else taken.plan.size
    where = f"rank {taken.rank} of {size}" if size > 1 else "one process"
    if taken.plan is not None and taken.plan.everyone > size:
        same = taken.plan.everyone // size
        where += f", with tensor parallelism over {same} ranks, whose layers' own traffic is extra"
    return "\n".join([f"The last step, {where}, predicted from shapes (bytes):", *lines])


def _report(
    owner: Owner,
    indices: Sequence[int],
    new: Sequence[int],
    columns: Sequence[int],
    taken: Taken,
    exchange: Plan,
) -> LayerReport:
    flops = sent = memory = 0.0
    schemes: list[str] = []
    for step in exchange.steps:
        width = sum(columns[i] for i in step.parameters if i in new)
        if width == 0:
            continue
        share = width / step.num_columns
        flops += share * float(step.flops[taken.rank])
        sent += share * float(step.elements[taken.rank])
        if exchange.size > 1:
            memory += share * float(step.memory[taken.rank])
            schemes.append(step.scheme.value)
        if step.scheme is Scheme.SUMS:
            shapes = [taken.shapes[i] for i in step.parameters if i in new]
            flops += sum(forming_flops(taken.batch, taken.objectives, s) for s in shapes)
    memory += sum(_held(taken.shapes[i], columns[i], taken) for i in new)
    materialised = any(s in (Scheme.ROWS.value, Scheme.SUMS.value) for s in schemes[:1])
    return LayerReport(
        owner.name,
        type(owner.module).__name__,
        "fallback" if owner.rule is None else owner.rule.__name__.strip("_"),
        _form(owner, indices, taken, materialised=materialised),
        ", ".join(dict.fromkeys(schemes)),
        flops,
        sent * exchange.itemsize,
        memory * taken.itemsize,
    )


def _form(owner: Owner, indices: Sequence[int], taken: Taken, *, materialised: bool) -> str:
    """The form of the layer's first parameter that has rows: its weight."""
    present = [i for i in indices if taken.shapes[i].kind != "none"]
    if not present:
        return "none"
    shape = taken.shapes[present[0]]
    if present[0] in taken.direct:
        return "direct"
    if shape.kind == "dense":
        return "fallback" if owner.rule is None else "rows"
    if materialised:
        return "materialised"
    if shape.kind == "lookup":
        return "lookup"
    return "pairwise" if _prefers_pairs(shape, taken) else "materialised"


def _prefers_pairs(shape: BlockShape, taken: Taken) -> bool:
    sizes = (taken.batch, shape.positions, taken.batch, shape.positions)
    dims = (taken.objectives, max(1, shape.in_features), shape.out_features)
    pairs = pairwise_flops(*sizes, *dims, own=True)
    return pairs <= materialised_flops(*sizes, *dims, own=True)


def _held(shape: BlockShape, columns: int, taken: Taken) -> float:
    """The numbers of a parameter's factors or rows and of the tiles made of them."""
    b, k = taken.batch, taken.objectives
    if shape.kind == "dense":
        return float(b * k * columns)
    if shape.kind == "lookup":
        return float(shape.positions * (2 + k * shape.in_features))
    if shape.kind == "none":
        return 0.0
    lines = b * shape.positions
    grads = 0 if shape.shares_grads else lines * k * shape.out_features
    tile = b * k * columns
    if _prefers_pairs(shape, taken):
        tile = lines**2 * (1 + k * k)
    return float(lines * shape.in_features + grads + min(taken.tile, tile))
