"""The products of two batches' rows, from the Gramian of both."""

from __future__ import annotations

import torch
from torch import Tensor

from jddist.distribution.counts import Count

from . import global_pass
from .agreement import Agreement
from .contribution import Contribution
from .joint import JointOutput


def cross_gramian(
    agreement: Agreement, first: Tensor, second: Tensor, counts: tuple[Count, Count] | None
) -> Tensor:
    """The global matrix J1 J2ᵀ; see ``Engine.cross_gramian``."""
    contributor = agreement.contributor
    joint: JointOutput | None = None

    def local() -> Contribution:
        nonlocal joint
        layouts = [contributor.layout_of(output) for output in (first, second)]
        joint = JointOutput.of(first, second, *layouts)
        return contributor.of_pair(joint, counts)

    agreed = agreement.of("Engine.cross_gramian", local, passes=not contributor.by_passes)
    assert joint is not None
    if contributor.by_passes:
        layouts = zip((joint.first, joint.second), joint.outputs, strict=True)
        vectors = [layout.rows_of(output) for layout, output in layouts]
        agreed = agreement.with_rows(agreed, vectors, retain_graph=True)
    parts = global_pass.gramian(
        contributor.distribution,
        agreed.layout,
        agreed.blocks,
        joint.output,
        contributor.table,
        contributor.prefer,
    )
    if not parts.finite:
        raise global_pass.nonfinite_error(agreed.layout, parts, contributor.spread())
    values = parts.values.to(torch.promote_types(joint.output.dtype, torch.float32))
    sizes = [info["both"] for info in agreed.infos] if agreed.layout.sharded else None
    return joint.cross(values, sizes)
