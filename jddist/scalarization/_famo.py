"""FAMO: weights that are learned from how much each objective decreased at the last step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jddist._checked import Checked
from jddist._stateful import Stateful

from ._bases import Scalarizer
from ._checks import as_shape, check_same_shape
from ._state import from_list, to_list

_EPSILON = 1e-8  # Added to values above their bounds, so that a value at its bound has a logarithm.
_BETA_1, _BETA_2, _ADAM_EPSILON = 0.9, 0.999, 1e-8  # Adam's defaults.


class FAMO(Scalarizer, Stateful):
    """Decreases the logarithms of all values at about the same rate.

    "FAMO: Fast Adaptive Multitask Optimization" (arXiv:2306.03792). With d_i = l_i - b_i + 1e-8 for
    values l and lower bounds b, and z = softmax(w), the scalar is c * sum of z_i log(d_i), where
    c = 1 / (sum of z_i / d_i) is held constant: its gradient with respect to l is on the simplex.

    After each step of the model's optimizer, call `update` with the values recomputed on the same
    batch. The logits w take a step of Adam, with the logarithms before minus those after as the
    loss of each z_i.

    The logits, Adam's state and the values of the last call are in the `state_dict`, and none of
    them is a parameter: the user's optimizer has nothing to do with them. A changed `lr` or
    `weight_decay` counts from the next update on. On several ranks each would learn logits from its
    own values: see `jddist.scalarization`.

    Args:
        shape: Shape of the values; n means (n,). It cannot be changed afterwards.
        min_losses: Lower bounds of the values, of that shape; None means 0 each.
        lr: Learning rate of the logits (>= 0).
        weight_decay: What Adam adds to the logits' gradient, times the logits (>= 0). The default
            is that of the paper's Algorithm 2; the authors' program has 1e-5.

    Attributes:
        min_losses: The lower bounds (a buffer).

    Raises:
        ValueError: A parameter is out of its range; at call time the values have another shape, or
            one is below its bound; `update` was called without a call before.
    """

    min_losses: Tensor
    _w: Tensor
    _mean: Tensor
    _square: Tensor

    lr = Checked[float](lambda value: value >= 0.0, "non-negative")
    weight_decay = Checked[float](lambda value: value >= 0.0, "non-negative")

    def __init__(
        self,
        shape: int | Sequence[int],
        min_losses: Tensor | None = None,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.weight_decay = weight_decay
        zeros = torch.zeros(as_shape(shape))
        for name in ("_w", "_mean", "_square"):
            self.register_buffer(name, zeros.clone())
        self.register_buffer("min_losses", zeros if min_losses is None else min_losses)
        self._num_updates = 0
        self._before: Tensor | None = None
        self._check_bounds()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return tuple(self._w.shape)

    def reset(self) -> None:
        """Forgets the logits, Adam's state and the values of the last call."""
        for buffer in (self._w, self._mean, self._square):
            buffer.zero_()
        self._num_updates = 0
        self._before = None

    def get_extra_state(self) -> dict[str, Any]:
        """The number of updates, and the values of the last call."""
        return {"num_updates": self._num_updates, "before": to_list(self._before)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes over what another instance remembered."""
        self._num_updates = state["num_updates"]
        self._before = from_list(state["before"])

    def forward(self, values: Tensor, /) -> Tensor:
        above = self._above_bounds(values)
        self._before = values.detach().clone()
        weights = self._softmax()
        scale = 1.0 / (weights / above).sum().detach()
        return (scale * weights * above.log()).sum()

    @torch.no_grad()
    def update(self, values: Tensor, /) -> None:
        """Learns from what the step of the model did to the values.

        Args:
            values: The values on the batch of the last call, after the step.

        Raises:
            ValueError: There was no call before; the values have another shape, or one of them is
                below its bound or not finite. The logits are then untouched.
        """
        if self._before is None:
            raise ValueError(
                "update() learns from a change of the values. Found no values from before: call "
                "the scalarizer on the losses before the step of the model."
            )
        before = self._above_bounds(self._before.to(values.device))
        decrease = before.log() - self._above_bounds(values).log()
        if not decrease.isfinite().all():
            raise ValueError(
                "update() expects finite values before and after the step. Found "
                f"{self._before.flatten().tolist()} and {values.flatten().tolist()}: leave out the "
                "update for this batch."
            )
        weights, decrease = self._softmax(), decrease.to(self._w.dtype)
        gradient = weights * (decrease - (weights * decrease).sum())
        self._take_adam_step(gradient + self.weight_decay * self._w)

    def _take_adam_step(self, gradient: Tensor) -> None:
        self._num_updates += 1
        self._mean.lerp_(gradient, 1.0 - _BETA_1)
        self._square.mul_(_BETA_2).addcmul_(gradient, gradient, value=1.0 - _BETA_2)
        unbiased_mean = self._mean / (1.0 - _BETA_1**self._num_updates)
        unbiased_square = self._square / (1.0 - _BETA_2**self._num_updates)
        self._w -= self.lr * unbiased_mean / (unbiased_square.sqrt() + _ADAM_EPSILON)

    def _softmax(self) -> Tensor:
        return self._w.flatten().softmax(dim=0).reshape(self._w.shape)

    def _above_bounds(self, values: Tensor) -> Tensor:
        """d, which is positive."""
        check_same_shape("the logits", self._w, values)
        self._check_bounds()
        above = values - self.min_losses + _EPSILON
        if (above <= 0.0).any():
            raise ValueError(
                "FAMO takes logarithms of values - min_losses. Found a value "
                f"{-above.min().item():.6g} below its bound: use losses that are never negative, "
                "or pass lower min_losses."
            )
        return above

    def _check_bounds(self) -> None:
        if self.min_losses.shape != self._w.shape:
            raise ValueError(
                f"min_losses must have the shape {self.shape} of the values. Found shape "
                f"{tuple(self.min_losses.shape)}: give one bound per value."
            )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(shape={self.shape}, lr={self.lr}, "
            f"weight_decay={self.weight_decay})"
        )
