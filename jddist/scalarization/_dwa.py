"""DWA: weights from how fast the objectives decreased over the last two epochs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jddist._checked import Checked
from jddist._stateful import Stateful

from ._bases import Scalarizer
from ._state import from_list, to_list


class DWA(Scalarizer, Stateful):
    """Weighs values the more, the less they decreased over the last two epochs.

    Dynamic weight average, "End-to-End Multi-Task Learning with Attention" (arXiv:1803.10704). With
    the averages a of the values over the last epoch and b over the one before, the weights of all m
    values are m * softmax(a / b / temperature), of sum m. During the first two epochs they are 1.

    Call `step` at the end of every epoch. Every call counts for the epoch's average, so call it on
    training losses only. The averages should not change their sign. Where an average b is zero, the
    limit is taken: a value that stays zero has the rate 1, and one that grew from zero takes all
    the weight.

    The state (the sum of this epoch's values, their number, and up to two averages) is in the
    `state_dict`. On several ranks each would average its own values: see `jddist.scalarization`.

    Args:
        temperature: The larger, the more equal the weights (> 0).

    Raises:
        ValueError: The temperature is not positive, or at call time the values have another shape
            than those remembered.
    """

    temperature = Checked[float](lambda value: value > 0, "positive")

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.reset()

    def reset(self) -> None:
        """Forgets all epochs."""
        self._sum: Tensor | None = None
        self._num_batches = 0
        self._averages: list[Tensor] = []

    def step(self) -> None:
        """Ends an epoch: its average becomes the newest one. Without calls since then, nothing."""
        if self._sum is None:
            return
        self._averages = [*self._averages[-1:], self._sum / self._num_batches]
        self._sum, self._num_batches = None, 0

    def get_extra_state(self) -> dict[str, Any]:
        """All that is remembered, as plain lists and numbers."""
        return {
            "sum": to_list(self._sum),
            "num_batches": self._num_batches,
            "averages": [to_list(average) for average in self._averages],
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes over what another instance remembered."""
        self._sum = from_list(state["sum"])
        self._num_batches = state["num_batches"]
        found = [from_list(average) for average in state["averages"]]
        self._averages = [average for average in found if average is not None]

    def forward(self, values: Tensor, /) -> Tensor:
        detached = values.detach()
        for remembered in (self._sum, *self._averages):
            if remembered is not None and remembered.shape != values.shape:
                raise ValueError(
                    f"The values must have the shape {tuple(remembered.shape)} of earlier calls. "
                    f"Found values of shape {tuple(values.shape)}: call reset() to start afresh."
                )
        weights = self._weights(detached)
        # A sum loaded from a state_dict is on the CPU.
        total = detached.clone() if self._sum is None else self._sum.to(values.device) + detached
        self._sum, self._num_batches = total, self._num_batches + 1
        return (weights * values).sum()

    def _weights(self, values: Tensor) -> Tensor:
        if len(self._averages) < 2:
            return torch.ones_like(values)
        older, newer = (average.to(values.device) for average in self._averages)
        rates = torch.where((older == 0.0) & (newer == 0.0), 1.0, newer / older)
        logits = torch.nan_to_num((rates / self.temperature).flatten(), nan=torch.nan)
        return values.numel() * logits.softmax(dim=0).reshape(values.shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(temperature={self.temperature})"
