"""The descriptor that validates hyperparameters."""

from __future__ import annotations

import copy
import pickle

import pytest
from torch import nn

from jddist._checked import Checked


class Step(nn.Module):
    size = Checked[float](lambda value: value > 0.0, "positive")

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size


def test_reads_sets_and_refuses() -> None:
    step, other = Step(0.5), Step(2.0)
    step.size = 0.25
    assert (step.size, other.size) == (0.25, 2.0)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"size must be positive\. Found size={wrong!r}\."):
            step.size = wrong
    assert step.size == 0.25
    with pytest.raises(ValueError, match="positive"):
        Step(-1.0)


def test_copies_and_pickles_keep_the_value() -> None:
    step = Step(0.5)
    for copied in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        assert copied.size == 0.5
        copied.size = 3.0
    assert step.size == 0.5
    assert isinstance(Step.size, Checked)
