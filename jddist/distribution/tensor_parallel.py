"""``parallelize_module``: parameters are sharded, and all ranks have the same batch.

Every rank holds a part of some parameters and all of the others, and the same objectives. The
columns of a row are those of all ranks together; what all hold alike counts once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement
from torch.nn.parameter import Parameter

from jddist.autogram.capture import paused

from .cut import like, new_rows, rows_like
from .lockstep import part_like
from .mesh import ranks_of_tensor_parallel
from .row_passes import RowPass
from .sharded import ShardedColumns, outermost


class TensorParallel(ShardedColumns):
    """Parameters that ``parallelize_module`` distributes over a mesh of one dimension.

    Args:
        roots: The models, some of whose parameters are DTensors.
        objectives: The placement of autojac's rows, or None.

    Raises:
        UnsupportedModelError: The mesh is not one of all ranks.
    """

    def __init__(self, roots: Sequence[nn.Module], objectives: Placement | None) -> None:
        roots = outermost(roots)
        named = [entry for root in roots for entry in root.named_parameters()]
        super().__init__(roots, objectives, ranks_of_tensor_parallel(named))

    def place_gradients(self, parameters: Sequence[Parameter]) -> None:
        """A backward of DTensors leaves some gradients replicated, or yet to be summed."""
        for parameter in parameters:
            gradient = parameter.grad
            if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
                if gradient.placements != parameter.placements:
                    parameter.grad = gradient.redistribute(placements=parameter.placements)

    def rows(
        self,
        passes: Sequence[RowPass],
        *,
        retain_graph: bool,
        summed: Collection[Parameter] = (),
    ) -> tuple[dict[Parameter, Tensor], list[bool]]:
        """Rows by one pass each, all ranks in lockstep; see ``reduced_rows``.

        Never by vmap, under which the collectives of the layers do not communicate.
        """
        parameters = list(dict.fromkeys(p for one in passes for p in one.parameters))
        found = {p: new_rows(p, 1 if p in summed else len(passes)) for p in parameters}
        finite = []
        for i, one in enumerate(passes):
            retain = retain_graph or i < len(passes) - 1
            finite.append(True)
            for parameter, gradient in _gradients(one, retain).items():
                finite[i] &= bool(gradient.isfinite().all())
                if one.scale != 0.0:  # else it does not count, whatever it is
                    target = found[parameter][0 if parameter in summed else i]
                    target.add_(gradient, alpha=one.scale)
        rows = {p: like(p, r[0]) if p in summed else rows_like(p, r) for p, r in found.items()}
        return rows, finite


def _gradients(one: RowPass, retain_graph: bool) -> dict[Parameter, Tensor]:
    """This rank's parts of one row."""
    if not one.parameters:
        return {}
    with paused():
        gradients = torch.autograd.grad(
            list(one.outputs),
            list(one.parameters),
            list(one.cotangents),
            retain_graph=retain_graph,
            allow_unused=True,
        )
    return {
        parameter: part_like(gradient, parameter)
        for parameter, gradient in zip(one.parameters, gradients, strict=True)
        if gradient is not None
    }
