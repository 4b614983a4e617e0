"""PCD: the first objective leads, and every other one is promised a share of its own progress."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from jddist._checked import Checked
from jddist._stateful import Stateful
from jddist.linalg.matrix import PSDMatrix

from ._bases import Forwarded, GramianWeightedAggregator
from ._cosines import invert
from ._host import Array, from_double, to_host_in_double
from ._nearest import nearest_in_cone
from ._weightings import GramianWeighting

DEPENDENT = 1e-9  # In float64: rows closer than this to the span of others count as dependent.


class PCDWeighting(GramianWeighting, Stateful):
    """Weights of `PCD`, from the Gramian [m, m] to [m]. Row 0 belongs to the primary objective.

    It remembers a moving average of the rows' squared lengths and the number of calls, also in its
    `state_dict`; they start afresh after `reset` and when m changes.

    Args:
        tau: Share of its own progress promised to each secondary objective (between 0 and 1); a
            number, or a vector [m - 1].
        beta: Decay of the moving average (>= 0 and < 1).
        eps: Added to the moving average (>= 0).

    Raises:
        ValueError: A parameter is out of its range, or at call time `tau` is a vector whose length
            is not m - 1.
    """

    differentiable: ClassVar[bool] = False  # The solver runs on numpy arrays.

    beta = Checked[float](lambda value: 0.0 <= value < 1.0, "at least 0 and below 1")
    eps = Checked[float](lambda value: value >= 0.0, "non-negative")

    def __init__(self, tau: float | Tensor = 0.02, beta: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__()
        self.tau = tau
        self.beta = beta
        self.eps = eps
        self.reset()

    @property
    def tau(self) -> float | Tensor:
        """Share of its own progress promised to each secondary objective."""
        return self._tau

    @tau.setter
    def tau(self, value: float | Tensor) -> None:
        if isinstance(value, Tensor) and value.ndim != 1:
            raise ValueError(
                "tau must be a number or a vector with one entry per secondary objective. Found a "
                f"tensor of shape {tuple(value.shape)}."
            )
        if not bool(torch.as_tensor((value >= 0.0) & (value <= 1.0)).all()):
            raise ValueError(f"tau must be between 0 and 1. Found tau={value!r}.")
        self._tau = value

    def reset(self) -> None:
        """Forgets the moving average."""
        self._n_calls = 0
        self._average: Array = np.zeros(0)

    def get_extra_state(self) -> Tensor:
        """The number of calls and the moving average, [1 + m], or [1] before any call."""
        return torch.from_numpy(np.concatenate([[float(self._n_calls)], self._average]))

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over the memory of another instance."""
        values = state.detach().to(device="cpu", dtype=torch.float64, copy=True).numpy()
        self._n_calls, self._average = int(values[0]), values[1:]

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        m = gramian.shape[0]
        if m == 0:
            return gramian.new_zeros(0)
        shares = self._shares(m)
        matrix = to_host_in_double(gramian)
        if not np.isfinite(matrix).all():
            return gramian.new_full([m], torch.nan)  # Without harm to the moving average.
        squares = matrix.diagonal()
        with np.errstate(all="ignore"):
            scales = self._update(squares)
            if squares[0] <= 0.0:
                return gramian.new_zeros(m)
            scaled = matrix * scales[:, None] * scales
            weights = self._combine(scaled, shares, 10.0 * torch.finfo(gramian.dtype).eps)
            weights *= scales * np.sqrt(squares[0])
        return from_double(weights, gramian)

    def _shares(self, m: int) -> Array:
        if not isinstance(self.tau, Tensor):
            return np.full(m - 1, float(self.tau))
        if len(self.tau) != m - 1:
            raise ValueError(
                f"tau has {len(self.tau)} entries, but there are {m - 1} secondary objectives "
                f"besides the primary one: give one entry to each, or a number for all."
            )
        return self.tau.detach().to(device="cpu", dtype=torch.float64).numpy()

    def _update(self, squares: Array) -> Array:
        """Moves the average on and returns the scale that normalizes each row, [m]."""
        if len(self._average) != len(squares):
            self._n_calls, self._average = 0, np.zeros_like(squares)
        self._n_calls += 1
        self._average = self.beta * self._average + (1.0 - self.beta) * squares
        unbiased = self._average / (1.0 - self.beta**self._n_calls)
        return invert(np.sqrt(unbiased + self.eps))

    def _combine(self, gramian: Array, shares: Array, rounding: float) -> Array:
        """Coefficients [m] of the direction, of length 1, or 0 if it is nothing but rounding."""
        multipliers = nearest_in_cone(
            gramian[1:, 1:],
            shares * gramian.diagonal()[1:] - gramian[1:, 0],
            tolerance=1e-9 * float(gramian.diagonal().max()),
            dependent=max(DEPENDENT, rounding),
        )
        weights = np.concatenate([[1.0], multipliers])
        squared_length = weights @ gramian @ weights
        # What squared_length would be if all the rows were parallel.
        greatest = (weights @ np.sqrt(np.maximum(gramian.diagonal(), 0.0))) ** 2
        if not squared_length > rounding * greatest:
            return np.zeros_like(weights)
        return weights / np.sqrt(squared_length)


class PCD(GramianWeightedAggregator, Stateful):
    """Follows the first row of the Jacobian as closely as fair shares for the other rows allow.

    "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical
    Multi-Objective Optimization" (arXiv:2606.29521). Every row g_i is normalized to
    h_i = g_i / sqrt(v_i + eps), where v_i is the moving average of its squared length over the
    calls, with bias correction. The direction is the d nearest to h_0 such that
    h_j . d >= tau |h_j|² for all j > 0: each secondary objective gets at least the share tau of the
    progress that h_j would give it. The result is d at the length of g_0.

    It is 0 if g_0 is 0, or if d is 0 up to rounding. If no d meets all conditions they are all
    dropped, and the result is g_0. A Gramian that is not finite gives NaN and leaves the moving
    average alone. One instance serves one group of parameters, since it remembers the average.

    Args:
        tau: Share of its own progress promised to each secondary objective (between 0 and 1); a
            number, or a vector [m - 1].
        beta: Decay of the moving average (>= 0 and < 1).
        eps: Added to the moving average (>= 0).

    Raises:
        ValueError: A parameter is out of its range, or at call time `tau` is a vector whose length
            is not m - 1.
    """

    gramian_weighting: PCDWeighting
    tau = Forwarded[float | Tensor, float | Tensor]()
    beta = Forwarded[float, float]()
    eps = Forwarded[float, float]()

    def __init__(self, tau: float | Tensor = 0.02, beta: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__(PCDWeighting(tau, beta, eps))

    def reset(self) -> None:
        """Forgets the moving average."""
        self.gramian_weighting.reset()
