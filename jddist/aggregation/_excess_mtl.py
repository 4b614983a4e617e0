"""ExcessMTL: weights that grow with how far each objective still is from its optimum."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from jddist._checked import Checked
from jddist._stateful import Stateful
from jddist.linalg.matrix import Matrix

from ._bases import Forwarded, WeightedAggregator
from ._columns import current_columns, weigh
from ._memory import ColumnState, Remembers
from ._simplex import uniform
from ._weightings import Weighting

EPS = 1e-7


class ExcessRiskWeighting(Weighting[Tensor], Remembers):
    """The part of `ExcessMTLWeighting` that works on m numbers, the excess risks.

    Args:
        robust_step_size: See `ExcessMTL`.
        n_warmup_steps: See `ExcessMTL`.
    """

    differentiable: ClassVar[bool] = False

    robust_step_size = Checked[float](lambda value: value > 0.0, "positive")
    n_warmup_steps = Checked[int](lambda value: value >= 0, "non-negative")

    def __init__(self, robust_step_size: float, n_warmup_steps: int) -> None:
        super().__init__()
        self.robust_step_size = robust_step_size
        self.n_warmup_steps = n_warmup_steps
        self.reset()

    def reset(self) -> None:
        """Forgets everything, so that the next call starts from equal weights and warms up."""
        super().reset()
        self._steps, self._has_baseline = 0, False

    def get_extra_state(self) -> dict[str, Tensor]:
        """Copies of the vectors, with the number of calls and whether there is a baseline."""
        progress = torch.tensor([self._steps, int(self._has_baseline)])
        return {**super().get_extra_state(), "progress": progress}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what another instance remembers."""
        super().set_extra_state({name: v for name, v in state.items() if name != "progress"})
        self._steps, has_baseline = state["progress"].tolist()
        self._has_baseline = bool(has_baseline)

    def forward(self, risks: Tensor, /) -> Tensor:
        m = len(risks)
        weights = self._recall("weights", risks, m)
        warmup = self._recall("warmup", risks, m)
        baseline = self._recall("baseline", risks, m)
        if weights is None or warmup is None or baseline is None:
            weights, warmup, baseline = uniform(risks, m), risks.new_zeros(m), risks.new_zeros(m)
            self._steps, self._has_baseline = 0, False
        if self._steps < self.n_warmup_steps:
            warmup = warmup + risks
        else:
            if self._has_baseline:
                risks = risks / (baseline + EPS)
            elif self.n_warmup_steps == 0:
                baseline = risks  # As in the authors' code, this call is not scaled.
            else:
                baseline = warmup / self.n_warmup_steps
                risks = risks / (baseline + EPS)
            self._has_baseline = True
            # In terms of logarithms, a huge risk saturates the weights instead of overflowing.
            weights = torch.softmax(weights.log() + self.robust_step_size * risks, dim=0)
        self._steps += 1
        self._memory = {"weights": weights, "warmup": warmup, "baseline": baseline}
        return weights


class ExcessMTLWeighting(Weighting[Matrix], Stateful):
    """Weights of `ExcessMTL`, from the Jacobian [m, n] to [m].

    It needs the Jacobian, not its Gramian: use it in a `WeightedAggregator`. It remembers the sums
    of squares [m, n], of which each shard keeps its columns, and a few vectors [m]. All start
    afresh after `reset` and when the Jacobian's shape or dtype changes.

    Args:
        robust_step_size: Step size of the weights (> 0).
        n_warmup_steps: Number of calls with equal weights that set the baseline (>= 0).

    Raises:
        ValueError: A parameter is out of its range.
    """

    differentiable: ClassVar[bool] = False  # The calls before are not part of the graph.
    needs_jacobian: ClassVar[bool] = True
    acts_on_columns = True

    robust_step_size = Forwarded[float, float]("excess_risk")
    n_warmup_steps = Forwarded[int, int]("excess_risk")

    def __init__(self, robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> None:
        super().__init__()
        self.excess_risk = ExcessRiskWeighting(robust_step_size, n_warmup_steps)
        self.squares = ColumnState()

    def reset(self) -> None:
        """Forgets everything, so that the next call starts from equal weights and warms up."""
        self.excess_risk.reset()
        self.squares.reset()

    def forward(self, matrix: Matrix, /) -> Tensor:
        total = self.squares.recall(matrix)
        if total is None:
            self.reset()
            total = torch.zeros_like(matrix)
        squares = matrix.square()
        total += squares
        self.squares.keep(total)
        risks = current_columns().sum((squares / (total + EPS).sqrt()).sum(dim=1))
        return weigh(self.excess_risk, risks)

    def __repr__(self) -> str:
        return (
            f"ExcessMTLWeighting(robust_step_size={self.robust_step_size!r}, "
            f"n_warmup_steps={self.n_warmup_steps!r})"
        )


class ExcessMTL(WeightedAggregator, Stateful):
    """Combines the rows with weights that grow with the estimated excess risk of each objective.

    "Robust Multi-Task Learning with Excess Risks" (arXiv:2402.02009). With S the sum of the squared
    Jacobians of all calls so far, row i has the excess risk e_i = sum_j J_ij^2 / sqrt(S_ij + 1e-7)
    (Equations 6 and 7), divided by its baseline. The weights, 1/m at first, are multiplied by
    exp(robust_step_size * e) and scaled to sum 1 (Equation 9). The baseline is the mean of e over
    the warm-up; without one it is e of the first call, which is then not divided.

    Args:
        robust_step_size: Step size of the weights (> 0).
        n_warmup_steps: Number of calls with equal weights that set the baseline (>= 0). The paper
            takes three epochs.

    Raises:
        ValueError: A parameter is out of its range.
    """

    weighting: ExcessMTLWeighting
    differentiable = False
    robust_step_size = Forwarded[float, float]("weighting")
    n_warmup_steps = Forwarded[int, int]("weighting")

    def __init__(self, robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> None:
        super().__init__(ExcessMTLWeighting(robust_step_size, n_warmup_steps))

    def reset(self) -> None:
        """Forgets everything, so that the next call starts from equal weights and warms up."""
        self.weighting.reset()
