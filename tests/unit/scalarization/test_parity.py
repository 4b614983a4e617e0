"""The same numbers as torchjd: values, gradients, learned parameters, sequences of steps.

Both compute the same formula, in another order of operations at most. Tolerances are 100 ulp of the
greatest number: a dozen operations of up to 24 summands, whose inputs logarithms and divisions by
mu = 0.05 amplify up to 20-fold. Adam divides gradients by their own size, which adds a factor for
sequences: 1,000 ulp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import jddist.scalarization as ours
from jddist.scalarization import DWA, FAMO, IMTLL, UW
from tests.unit.scalarization._cases import LEARNED, NAMES, SHAPES, arguments, make, values_of

peer = pytest.importorskip("torchjd.scalarization")
DTYPES = [torch.float64, torch.float32]


def _close(actual: Tensor, expected: Tensor, ulps: int = 100) -> None:
    bound = ulps * torch.finfo(expected.dtype).eps
    scale = max(1.0, float(expected.detach().abs().max()))
    assert_close(actual, expected, rtol=0.0, atol=bound * scale)


def _pair(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, Any]:
    return make(name, shape, dtype), make(name, shape, dtype, peer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for seed in range(5):
        values = values_of(shape, seed, dtype)
        results = [scalarizer(values) for scalarizer in _pair(name, shape, dtype)]
        assert results[0].shape == ()
        _close(*results)
        mine, theirs = (torch.autograd.grad(result, values)[0] for result in results)
        _close(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LEARNED)
def test_learned_parameters(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pair = _pair(name, shape, dtype)
    assert [n for n, _ in pair[0].named_parameters()] == [n for n, _ in pair[1].named_parameters()]
    optimizers = [torch.optim.SGD(s.parameters(), lr=0.3, momentum=0.9) for s in pair]
    for seed in range(5):
        values = values_of(shape, seed, dtype)
        for scalarizer, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            scalarizer(values).backward()
        (mine,), (theirs,) = (list(s.parameters()) for s in pair)
        _close(mine.grad, theirs.grad)
        for optimizer in optimizers:
            optimizer.step()
        _close(mine, theirs)
        _close(pair[0](values), pair[1](values))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dwa_over_epochs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pair = _pair("DWA", shape, dtype)
    for epoch in range(5):
        if epoch == 3:  # A changed temperature counts at once.
            for scalarizer in pair:
                scalarizer.temperature = 0.4
        for batch in range(3 if epoch != 1 else 1):
            values = values_of(shape, 10 * epoch + batch, dtype)
            results = [scalarizer(values) for scalarizer in pair]
            _close(*results)
            _close(*(torch.autograd.grad(result, values)[0] for result in results))
        for scalarizer in pair:
            scalarizer.step()
            scalarizer.step()  # Without batches in between it does nothing.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["FAMO", "FAMO-full"])
def test_famo_over_steps(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pair = _pair(name, shape, dtype)
    for step in range(8):
        before, after = values_of(shape, 2 * step, dtype), values_of(shape, 2 * step + 1, dtype)
        results = [scalarizer(before) for scalarizer in pair]
        _close(results[0], results[1], 1000)
        _close(*(torch.autograd.grad(result, before)[0] for result in results), 1000)
        for scalarizer in pair:
            scalarizer.update(after)
        _close(pair[0]._w, pair[1]._w.detach(), 1000)


def test_famo_keeps_float32_logits_for_float64_values_as_the_peer_does() -> None:
    pair = [FAMO(3), peer.FAMO(3)]
    for step in range(3):
        values = values_of((3,), step)
        _close(*(scalarizer(values).to(torch.float32) for scalarizer in pair), 1000)
        for scalarizer in pair:
            scalarizer.update(values_of((3,), step + 10))
        assert pair[0]._w.dtype == pair[1]._w.dtype == torch.float32


@pytest.mark.parametrize("reset_after", [1, 2])
@pytest.mark.parametrize("name", ["DWA", "FAMO", *LEARNED])
def test_reset(name: str, reset_after: int) -> None:
    pair = _pair(name, (3,), torch.float64)
    for step in range(4):
        values = values_of((3,), step)
        for scalarizer in pair:
            scalarizer(values).backward()
            if name == "FAMO":
                scalarizer.update(values_of((3,), step + 10))
            elif name == "DWA":
                scalarizer.step()
            else:
                with torch.no_grad():
                    next(scalarizer.parameters()).add_(0.5)
            if step == reset_after:
                scalarizer.reset()
        _close(pair[0](values), pair[1](values), 1000)


@pytest.mark.parametrize("name", NAMES)
def test_texts(name: str) -> None:
    mine, theirs = _pair(name, (2,), torch.float64)
    assert repr(mine) == repr(theirs)
    assert str(mine) == str(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_readable_and_settable(name: str) -> None:
    mine = make(name, (2,))
    for argument, value in arguments(name, (2,)).items():
        found = getattr(mine, argument)
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value
        if argument != "shape":
            setattr(mine, argument, value)


REFUSED: list[Callable[[Any], object]] = [
    lambda p: p.GeometricMean()(torch.tensor([1.0, -1.0])),
    lambda p: p.DWA(0.0),
    lambda p: p.DWA(-1.0),
    lambda p: p.FAMO(2, lr=-0.1),
    lambda p: p.FAMO(2, weight_decay=-0.1),
    lambda p: p.FAMO(2, torch.zeros(3)),
    lambda p: p.FAMO(2)(torch.ones(3)),
    lambda p: p.FAMO(2).update(torch.ones(2)),
    lambda p: p.IMTLL(2)(torch.ones(3)),
    lambda p: p.IMTLL(2)(torch.ones(2, 1)),
    lambda p: p.UW((2, 1))(torch.ones(2)),
    lambda p: p.STCH(0.0),
    lambda p: p.STCH(-1.0),
    lambda p: p.STCH(1.0, weights=torch.ones(3))(torch.ones(2)),
    lambda p: p.STCH(1.0, reference=torch.ones(3))(torch.ones(2)),
    lambda p: p.COSMOS(-1.0, torch.ones(2)),
    lambda p: p.COSMOS(1.0, torch.ones(2))(torch.ones(3)),
    lambda p: p.PBI(-1.0, torch.ones(2)),
    lambda p: p.PBI(1.0, torch.ones(2))(torch.ones(3)),
    lambda p: p.PBI(1.0, torch.ones(2), torch.ones(3))(torch.ones(2)),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_the_peer_refuses(case: int) -> None:
    for package in (peer, ours):
        with pytest.raises(ValueError):
            REFUSED[case](package)


def test_the_peer_has_no_method_that_is_missing() -> None:
    assert set(peer.__all__) == set(ours.__all__)


def test_uw_and_imtll_are_the_same_method() -> None:
    uw, imtll = UW(3), IMTLL(3)
    values = values_of((3,), dtype=torch.float32)
    with torch.no_grad():
        uw.log_var.copy_(torch.tensor([0.5, -1.0, 2.0]))
        imtll.log_scale.copy_(-uw.log_var)
    _close(2.0 * uw(values), imtll(values))


def test_dwa_needs_values_of_one_shape() -> None:
    for package in (ours, peer):
        dwa = package.DWA()
        dwa(torch.ones(3))
        with pytest.raises(ValueError, match="shape"):
            dwa(torch.ones(4))


def test_dwa_needs_values_of_one_shape_over_epochs() -> None:
    # The peer notices only in the third epoch, after averaging [1] and [3].
    dwa = DWA()
    dwa(torch.ones(1))
    dwa.step()
    with pytest.raises(ValueError, match="reset"):
        dwa(torch.ones(3))
    dwa.reset()
    assert dwa(torch.ones(3)) == 3.0
