"""What stateful methods remember, and how it gets into `state_dict` and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jddist._stateful import Stateful

from ._columns import current_columns


class Remembers(nn.Module, Stateful):
    """Mixin of methods that remember a few small tensors by name, none before the first call.

    They are the module's extra state in `state_dict`, so a fresh instance can take them over. A
    subclass calls `reset` when it is created.
    """

    _memory: dict[str, Tensor]

    def reset(self) -> None:
        """Forgets everything, so that the next call is like the first."""
        self._memory = {}

    def get_extra_state(self) -> dict[str, Tensor]:
        """Copies of what is remembered."""
        return {name: value.detach().clone() for name, value in self._memory.items()}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what another instance remembers."""
        self._memory = {name: value.detach().clone() for name, value in state.items()}

    def _recall(self, name: str, like: Tensor, size: int) -> Tensor | None:
        """A remembered vector, or None if there is none of that size and of the dtype of `like`."""
        value = self._memory.get(name)
        if value is None or value.shape != (size,) or value.dtype != like.dtype:
            return None
        return value.to(like.device)


class ColumnState(nn.Module, Stateful):
    """A remembered tensor [m, n], of which each shard keeps only the columns [m, n_r] at hand.

    Those have to be consecutive columns of J, in its order. In `state_dict` it is one tensor over
    all columns: a plain one in one process; over several ranks whatever the current columns pack
    their part into, so that it can be resharded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forgets the tensor."""
        self._packed: Tensor | None = None

    def recall(self, matrix: Tensor) -> Tensor | None:
        """The columns at hand, or None if nothing of J's shape and dtype is remembered.

        Args:
            matrix: The columns of J at hand, [m, n_r].
        """
        columns, packed = current_columns(), self._packed
        total = columns.total(matrix.shape[1])
        if packed is None or packed.shape != (len(matrix), total) or packed.dtype != matrix.dtype:
            return None
        return columns.unpack(packed).to(matrix.device)

    def keep(self, value: Tensor) -> None:
        """Remembers the columns at hand, [m, n_r]."""
        self._packed = current_columns().pack(value)

    def get_extra_state(self) -> Tensor:
        """A copy of the tensor, or an empty one [0, 0] if there is none."""
        return torch.empty(0, 0) if self._packed is None else self._packed.detach().clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over the tensor of another instance."""
        self._packed = None if state.shape == (0, 0) else state.detach().clone()


def needs_order(module: nn.Module) -> bool:
    """Whether a shard's columns have to be consecutive ones of J, in its order."""
    return any(isinstance(part, ColumnState) for part in module.modules())
