"""The same numbers and draws as torchjd for methods with a memory, a mask or two batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import jddist.aggregation as ours
from tests.unit.aggregation._parity_stateful import (
    AGGREGATORS,
    LIMITS,
    TWO_BATCHES,
    compare_stateful,
)

peer = pytest.importorskip("torchjd.aggregation")

dtypes = pytest.mark.parametrize("dtype", LIMITS, ids=str)


@dtypes
@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregators(name: str, dtype: torch.dtype) -> None:
    compared, excluded, _ = compare_stateful(name, dtype)
    assert compared + len(excluded) == 84
    # PCGrad asks for the sign of products that are rounding noise on a matrix of rank 1.
    assert len(excluded) <= (2 if name == "CRMOGM(PCGrad)" else 0)
    assert all(cell.startswith("rank 1") for cell in excluded)


@dtypes
@pytest.mark.parametrize("name", TWO_BATCHES)
def test_weightings_of_two_batches(name: str, dtype: torch.dtype) -> None:
    compared, excluded, _ = compare_stateful(name, dtype)
    assert compared + len(excluded) == 84
    # Rounding counts for more where products of size 100 move the weights; what holds in the
    # excluded cells as well is asserted in test_properties_stateful.
    assert len(excluded) <= (12 if dtype == torch.float32 else 1)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda lib: lib.GradDrop(leak=torch.tensor([0.5, 1.0])), "GradDrop([0.5, 1.])"),
        (lambda lib: lib.GradDrop(), "GradDrop"),
        (lambda lib: lib.TrimmedMean(2), "TM2"),
        (lambda lib: lib.ExcessMTL(), "ExcessMTL"),
    ],
)
def test_short_texts(make: Callable[[Any], Any], text: str) -> None:
    assert str(make(ours)) == str(make(peer)) == text


@pytest.mark.parametrize(
    "make",
    [
        lambda lib: lib.TrimmedMean(2),
        lambda lib: lib.ExcessMTL(0.5, 3),
        lambda lib: lib.ExcessMTLWeighting(0.5, 3),
        lambda lib: lib.MoDoWeighting(),
        lambda lib: lib.SDMGradWeighting(pref_vector=torch.ones(2)),
    ],
)
def test_long_texts(make: Callable[[Any], Any]) -> None:
    assert repr(make(ours)) == repr(make(peer))


@pytest.mark.parametrize(
    ("make", "name", "values"),
    [
        (lambda lib: lib.GradDrop(), "leak", [torch.tensor(1.0), torch.ones(2, 2)]),
        (lambda lib: lib.TrimmedMean(1), "trim_number", [-1]),
        (lambda lib: lib.ExcessMTL(), "robust_step_size", [0.0, -1.0]),
        (lambda lib: lib.ExcessMTL(), "n_warmup_steps", [-1]),
        (lambda lib: lib.CRMOGMWeighting(lib.MeanWeighting()), "alpha", [-0.1, 1.1]),
        (lambda lib: lib.MoDoWeighting(), "gamma", [0.0]),
        (lambda lib: lib.MoDoWeighting(), "rho", [-0.1]),
        (lambda lib: lib.SDMGradWeighting(), "lr", [0.0]),
        (lambda lib: lib.SDMGradWeighting(), "momentum", [-0.1, 1.0]),
        (lambda lib: lib.SDMGradWeighting(), "n_iter", [0]),
        (lambda lib: lib.SDMGradWeighting(), "lambda_", [-0.1]),
        (lambda lib: lib.SDMGradWeighting(), "pref_vector", [torch.tensor(1.0)]),
    ],
)
def test_both_refuse(make: Callable[[Any], Any], name: str, values: list[Any]) -> None:
    for lib in (ours, peer):
        method = make(lib)
        before = getattr(method, name)
        for value in values:
            with pytest.raises(ValueError, match=name):
                setattr(method, name, value)
        assert getattr(method, name) is before


@pytest.mark.parametrize(
    "make",
    [
        lambda lib: lib.GradDrop(leak=torch.ones(3)),
        lambda lib: lib.TrimmedMean(1),
        lambda lib: lib.WeightedAggregator(
            lib.CRMOGMWeighting(lib.MeanWeighting(), initial_weights=torch.ones(3))
        ),
    ],
)
def test_both_refuse_another_number_of_objectives(make: Callable[[Any], Any]) -> None:
    for lib in (ours, peer):
        with pytest.raises(ValueError):
            make(lib)(torch.ones(2, 5))
