"""What strategies have in common under which every rank holds a part of each row."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement
from torch.nn.parameter import Parameter

from .base import Distribution
from .cut import new_rows, rows_like
from .lockstep import Lockstep
from .mesh import Ranks
from .row_passes import RowPass


class ShardedColumns(Distribution, ABC):
    """Parameters that are sharded: rows come in passes of all ranks, each left with its columns.

    Args:
        roots: The models, none of them a part of another.
        objectives: The placement of autojac's rows, or None.
        ranks: What the ranks have in common.
    """

    shards_columns = True

    def __init__(
        self, roots: Sequence[nn.Module], objectives: Placement | None, ranks: Ranks
    ) -> None:
        super().__init__(
            ranks.objectives, objectives, everyone=ranks.everyone, columns=ranks.columns
        )
        self._roots = [weakref.ref(root) for root in roots]
        for root in roots:
            self.register(root)
        if ranks.tensor is not None:
            self.lockstep = Lockstep(ranks.tensor, list(self.names), self._agree_on_pass)

    def _agree_on_pass(self, info: dict[str, Any], error: Exception | None) -> None:
        call = "a pass over tensor-parallel layers"
        self.by_objectives(self.handshake(call, {}, info, error))

    @property
    def roots(self) -> list[nn.Module]:
        """The models that are still alive."""
        alive = [ref() for ref in self._roots]
        return [root for root in alive if root is not None]

    def put_back(self) -> None:
        """Puts the parameters back into their modules, if the wrapper took them out."""
        return None

    def check_takes_passes(self) -> None:
        """Raises ValueError unless rows can be told from gradients that wait for reduction."""
        return None  # nothing waits where nothing is reduced

    def check_same_objectives(self, tensors: Sequence[Tensor]) -> None:
        """Raises an error on every rank unless those in lockstep have the same objectives."""
        if not self.lockstep.active:
            return
        error: Exception | None = None
        named = {f"objectives {i}": tensor for i, tensor in enumerate(tensors)}
        coarsest = max((torch.finfo(t.dtype).eps for t in tensors), default=0.0)
        try:
            self.lockstep.check_same(named, coarsest**0.5)
        except Exception as failure:  # raised again on every rank, by the handshake
            error = failure
        self.handshake("the objectives of ranks in lockstep", {}, {}, error)

    @abstractmethod
    def rows(
        self,
        passes: Sequence[RowPass],
        *,
        retain_graph: bool,
        summed: Collection[Parameter] = (),
    ) -> tuple[dict[Parameter, Tensor], list[bool]]:
        """Rows by one pass each; every rank has to call. See ``reduced_rows``."""

    def no_rows(self, parameter: Parameter) -> Tensor:
        """The Jacobian of nothing."""
        return rows_like(parameter, new_rows(parameter, 0))


def outermost(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the modules that are no parts of others among them."""
    modules = list(dict.fromkeys(modules))
    below = {child for root in modules for child in root.modules() if child is not root}
    return [module for module in modules if module not in below]
