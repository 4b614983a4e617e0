"""Two outputs as one: how the Gramian of two batches' objectives gives their cross Gramian."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import OutputLayout


@dataclass(frozen=True, eq=False)
class JointOutput:
    """The objectives of two batches, one after the other in a vector.

    Attributes:
        output: The vector [m1 + m2] of this rank's objectives.
        outputs: Both outputs, with their graphs.
        first: The layout of the first output.
        second: The layout of the second output.
    """

    output: Tensor
    outputs: tuple[Tensor, Tensor]
    first: OutputLayout
    second: OutputLayout

    @staticmethod
    def of(
        first: Tensor, second: Tensor, first_layout: OutputLayout, second_layout: OutputLayout
    ) -> JointOutput:
        """Joins two outputs, given their layouts."""
        rows = [first_layout.rows_of(first.detach()), second_layout.rows_of(second.detach())]
        return JointOutput(torch.cat(rows), (first, second), first_layout, second_layout)

    def cross(self, gramian: Tensor, sizes: Sequence[Sequence[int]] | None) -> Tensor:
        """The block J1 J2ᵀ of the Gramian of both, in the shape of a generalized Gramian.

        Args:
            gramian: Gramian [M, M] of all ranks' vectors, one rank after the other.
            sizes: If every rank has objectives of its own, each rank's sizes of the sharded
                dimension of both outputs; None if all ranks have the same objectives.
        """
        first, second = self.first, self.second
        rows = [(first.num_rows, second.num_rows)]
        if sizes is not None:
            rows = [(first.resized(a).num_rows, second.resized(b).num_rows) for a, b in sizes]
            first = first.resized(sum(a for a, _ in sizes))
            second = second.resized(sum(b for _, b in sizes))
        is_first = torch.cat([torch.arange(a + b) < a for a, b in rows]).to(gramian.device)
        return first.generalized(gramian[is_first][:, ~is_first], second)
