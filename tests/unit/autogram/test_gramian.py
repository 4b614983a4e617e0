"""The engine's Gramian and weighted gradient against the oracle, on the whole zoo and all shapes.

The oracle works on a second model, from the same seed, that no engine has touched.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from jddist.autogram import Engine
from tests._oracle import flat_grad, gramian, jacobian, relative_error, weighted_gradient
from tests.cases import CASES, Case
from tests.unit.autogram._common import SLOW_WAY, slow_way

BATCH = 5


def _losses(case: Case, model: nn.Module, size: int, seed: int = 0) -> Tensor:
    torch.manual_seed(1000 + seed)  # the same dropout masks for the engine and for the oracle
    return case.losses(model, case.batch(size, seed))


def _named(cases: list[Case]) -> list[object]:
    return [pytest.param(case, id=case.name) for case in cases]


BATCHED = _named([case for case in CASES if case.batch_dim_ok])
UNBATCHED = _named([case for case in CASES if case.none_ok])


def _check(case: Case, batch_dim: int | None, size: int, announced: bool) -> None:
    model = case.model()
    untouched = case.model()
    engine = Engine(model, batch_dim=batch_dim)
    losses = _losses(case, model, size)
    reference = _losses(case, untouched, size)
    # The hooks must not change the forward; they may expand what is broadcast later, exactly.
    assert torch.equal(losses, reference)

    with slow_way(announced):
        found = engine.compute_gramian(losses)
    parameters = list(untouched.parameters())
    assert relative_error(found, gramian(reference, parameters)) <= case.tolerance

    weights = torch.randn(losses.shape, dtype=torch.float64)
    returned = engine.backward(losses, weights)
    assert torch.equal(returned, weights)
    expected = weighted_gradient(reference, weights, parameters)
    assert relative_error(flat_grad(model.parameters()), expected) <= case.tolerance


@pytest.mark.parametrize("case", BATCHED)
def test_batched(case: Case) -> None:
    _check(case, 0, BATCH, case.announced)


@pytest.mark.parametrize("case", UNBATCHED)
def test_unbatched(case: Case) -> None:
    _check(case, None, BATCH, announced=False)


@pytest.mark.parametrize("case", BATCHED)
def test_one_sample(case: Case) -> None:
    """With one sample every broadcast dimension looks like the batch."""
    model = case.model()
    engine = Engine(model, batch_dim=0)
    losses = _losses(case, model, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SLOW_WAY)
        found = engine.compute_gramian(losses)
    assert relative_error(found, gramian(losses, model.parameters())) <= case.tolerance


@pytest.mark.parametrize("case", BATCHED)
def test_next_batches(case: Case) -> None:
    """What was learnt from the first batch holds for the next, and other sizes change nothing.

    Some of the sizes are those of other dimensions: positions, masks, features.
    """
    model = case.model()
    engine = Engine(model, batch_dim=0)
    for seed, announced in [(1, case.announced), (2, False)]:
        losses = _losses(case, model, BATCH, seed)
        with slow_way(announced):
            found = engine.compute_gramian(losses)
        assert relative_error(found, gramian(losses, model.parameters())) <= case.tolerance
    for size, seed in [(4, 3), (6, 4), (3, 5)]:
        losses = _losses(case, model, size, seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", SLOW_WAY)
            found = engine.compute_gramian(losses)
        assert relative_error(found, gramian(losses, model.parameters())) <= case.tolerance


@pytest.mark.parametrize("case", _named([c for c in CASES if c.batch_dim_ok and c.empty_ok]))
def test_no_samples(case: Case) -> None:
    """A rank without data: an empty Gramian, and zero gradients for what the graph reaches."""
    model = case.model()
    engine = Engine(model, batch_dim=0)
    losses = _losses(case, model, 0)
    found = engine.compute_gramian(losses)
    assert found.shape == losses.shape + losses.shape[::-1]
    engine.backward(losses, torch.zeros_like(losses))
    assert not flat_grad(model.parameters()).any()


@pytest.mark.parametrize("batch_dim", [0, None])
def test_no_objectives_of_a_dummy_sample(batch_dim: int | None) -> None:
    """The other way to have no data: ``losses[:0]`` of any sample."""
    case = next(case for case in CASES if case.name == "gpt2")
    model = case.model()
    engine = Engine(model, batch_dim=batch_dim)
    losses = _losses(case, model, 1)[:0]
    assert engine.compute_gramian(losses).shape == (0, 0)
    engine.backward(losses, losses.detach())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def _cnn() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 12), nn.Unflatten(1, (3, 4))
    ).double()
    return model, torch.randn(5, 2, 6, dtype=torch.float64)


OUTPUTS = {
    "scalar": (lambda out: out.square().sum(), None),
    "vector": (lambda out: out.square().sum((1, 2)), 0),
    "vector_negative": (lambda out: out.square().sum((1, 2)), -1),
    "vector_unbatched": (lambda out: out.square().sum((1, 2)), None),
    "tasks": (lambda out: out.square().sum((0, 1)), None),
    "matrix": (lambda out: out.square().sum(2), 0),
    "matrix_samples_last": (lambda out: out.square().sum(2).T, 1),
    "matrix_samples_last_negative": (lambda out: out.square().sum(2).T, -1),
    "matrix_unbatched": (lambda out: out.square().sum(2), None),
    "cube": (lambda out: out.sin(), 0),
    "cube_samples_in_the_middle": (lambda out: out.sin().transpose(0, 1), 1),
    "cube_samples_last": (lambda out: out.sin().movedim(0, 2), 2),
    "cube_unbatched": (lambda out: out.sin(), None),
    "one_of_each": (lambda out: out.square().sum((1, 2))[:, None, None], 0),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_shapes(name: str) -> None:
    objective, batch_dim = OUTPUTS[name]
    model, x = _cnn()
    engine = Engine(model, batch_dim=batch_dim)
    output = objective(model(x))
    found = engine.compute_gramian(output)
    assert found.shape == output.shape + output.shape[::-1]
    assert relative_error(found, gramian(output, model.parameters())) <= 1e-10
    weights = torch.randn(output.shape, dtype=torch.float64)
    engine.backward(output, weights, retain_graph=True)
    expected = weighted_gradient(output, weights, model.parameters())
    assert relative_error(flat_grad(model.parameters()), expected) <= 1e-10


def test_the_layout_of_a_generalized_gramian() -> None:
    """G[i, j, k, l] = <J[i, j], J[l, k]>, written out; the oracle itself is held to it."""
    model, x = _cnn()
    output = model(x).square().sum(2)
    rows = jacobian(output, model.parameters()).reshape(5, 3, -1)
    expected = torch.einsum("ijn,lkn->ijkl", rows, rows)
    assert relative_error(gramian(output, model.parameters()), expected) <= 1e-14
    engine = Engine(model, batch_dim=0)
    found = engine.compute_gramian(model(x).square().sum(2))
    assert found.shape == (5, 3, 3, 5)
    assert relative_error(found, expected) <= 1e-10


@pytest.mark.parametrize("batch_dim", [0, None])
def test_the_gramian_is_symmetric_and_positive(batch_dim: int | None) -> None:
    model, x = _cnn()
    engine = Engine(model, batch_dim=batch_dim)
    found = engine.compute_gramian(model(x).square().sum((1, 2)))
    assert torch.equal(found, found.T)
    # Rounding alone may make an eigenvalue negative: 1e-13 is 100 times it for 5 rows.
    assert torch.linalg.eigvalsh(found)[0] >= -1e-13 * found.trace()


def test_an_output_without_the_batch_dimension_is_refused() -> None:
    model, x = _cnn()
    engine = Engine(model, batch_dim=1)
    with pytest.raises(ValueError, match=r"shape \(5,\) with batch_dim=1"):
        engine.compute_gramian(model(x).square().sum((1, 2)))


def test_an_output_without_a_graph_is_refused() -> None:
    model, x = _cnn()
    engine = Engine(model, batch_dim=0)
    with pytest.raises(ValueError, match="require a gradient"):
        engine.compute_gramian(model(x).square().sum((1, 2)).detach())
