"""NashMTL: the bargaining solution, where every objective's gain is the inverse of its weight."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from jddist._checked import Checked
from jddist._stateful import Stateful
from jddist.linalg.matrix import PSDMatrix

from ._bases import Forwarded, GramianWeightedAggregator
from ._fair import balance
from ._host import Array, from_double, relative_rounding, to_host_in_double
from ._weightings import GramianWeighting


class NashMTLWeighting(GramianWeighting, Stateful):
    """Weights of `NashMTL`, from the Gramian [m, m] to [m].

    It remembers the weights before clipping and the number of calls, also in its `state_dict`.

    Args:
        n_tasks: Number m of objectives (> 0).
        max_norm: Greatest length of the combination of the rows (>= 0); 0 means any.
        update_weights_every: Number of calls that one solution serves (> 0).
        optim_niter: Greatest number of Newton steps (> 0).

    Raises:
        ValueError: A parameter is out of its range, or at call time there are not m objectives.
    """

    differentiable: ClassVar[bool] = False  # The solver runs on numpy arrays.

    max_norm = Checked[float](lambda value: value >= 0.0, "non-negative")

    n_tasks = Checked[int](lambda value: value > 0, "positive")
    update_weights_every = Checked[int](lambda value: value > 0, "positive")
    optim_niter = Checked[int](lambda value: value > 0, "positive")

    def __init__(
        self,
        n_tasks: int,
        max_norm: float = 1.0,
        update_weights_every: int = 1,
        optim_niter: int = 20,
    ) -> None:
        super().__init__()
        self.n_tasks = n_tasks
        self.max_norm = max_norm
        self.update_weights_every = update_weights_every
        self.optim_niter = optim_niter
        self.reset()

    def reset(self) -> None:
        """Forgets the weights and the number of calls."""
        self._n_calls = 0
        self._weights: Array = np.zeros(0)

    def get_extra_state(self) -> Tensor:
        """The number of calls and the weights before clipping, [1 + m], or [1] before any call."""
        return torch.from_numpy(np.concatenate([[float(self._n_calls)], self._weights]))

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over the memory of another instance."""
        values = state.detach().to(device="cpu", dtype=torch.float64, copy=True).numpy()
        self._n_calls, self._weights = int(values[0]), values[1:]

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        m = gramian.shape[0]
        if m != self.n_tasks:
            raise ValueError(
                f"NashMTL was made for n_tasks={self.n_tasks} objectives, but the Gramian is of "
                f"{m}: set n_tasks to the number of objectives."
            )
        matrix = to_host_in_double(gramian)
        due = self._n_calls % self.update_weights_every == 0
        self._n_calls += 1
        largest = float(np.abs(matrix).max())
        if largest > 0.0:
            matrix = matrix / largest  # So that nothing overflows.
        if due or len(self._weights) != m:
            # The solution for a Gramian of Frobenius norm 1.
            solution = balance(matrix, 1.0, relative_rounding(gramian), self.optim_niter)
            self._weights = np.sqrt(np.linalg.norm(matrix)) * solution
        weights = self._weights
        norm = float(np.sqrt(largest) * np.sqrt(np.maximum(weights @ matrix @ weights, 0.0)))
        if 0.0 < self.max_norm < norm:
            weights = weights * (self.max_norm / norm)
        return from_double(weights, gramian)


class NashMTL(GramianWeightedAggregator, Stateful):
    """Combines the rows of the Jacobian by the Nash bargaining solution of the objectives.

    "Multi-Task Learning as a Bargaining Game" (arXiv:2202.01017), Algorithm 1: with G divided by
    its Frobenius norm, the weights a > 0 satisfy G a = 1 / a. They are then scaled down until the
    result is no longer than `max_norm`. A row of zeros takes no part and has the weight 0.

    The equation is solved to rounding error, from the same start at every call. The official code,
    and torchjd with it, runs a sequence of convex programs instead: it stops at a residual of 1e-3,
    hands back the iterate before the last one, keeps the weights of earlier calls without a word
    where its solver fails (as it does on rows of zeros), and starts from them, so that its result
    depends on them. At a Pareto stationary point no a solves the equation; the weights are then
    those of a problem within rounding error of the given one.

    The weights and the number of calls are remembered: one instance serves one group of parameters.

    Args:
        n_tasks: Number m of objectives (> 0).
        max_norm: Greatest length of the result (>= 0); 0 means any.
        update_weights_every: Number of calls that one solution serves (> 0). Clipping is done
            afresh at every call.
        optim_niter: Greatest number of Newton steps (> 0).

    Raises:
        ValueError: A parameter is out of its range, or at call time there are not m rows.
    """

    gramian_weighting: NashMTLWeighting
    n_tasks = Forwarded[int, int]()
    max_norm = Forwarded[float, float]()
    update_weights_every = Forwarded[int, int]()
    optim_niter = Forwarded[int, int]()

    def __init__(
        self,
        n_tasks: int,
        max_norm: float = 1.0,
        update_weights_every: int = 1,
        optim_niter: int = 20,
    ) -> None:
        super().__init__(NashMTLWeighting(n_tasks, max_norm, update_weights_every, optim_niter))

    def reset(self) -> None:
        """Forgets the weights and the number of calls."""
        self.gramian_weighting.reset()
