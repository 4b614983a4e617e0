"""Gramians: layout of generalized ones, reshaping, normalization and its cliff."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from jddist.linalg import gramian
from jddist.linalg.gramian import (
    compute_gramian,
    flatten_gramian,
    normalize,
    regularize,
    unflatten_gramian,
)
from jddist.linalg.matrix import is_matrix, is_psd_matrix, is_psd_tensor


def _randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 31 * len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_gramian_of_a_matrix() -> None:
    jacobian = _randn(3, 5)
    assert_close(compute_gramian(jacobian), jacobian @ jacobian.T)
    assert_close(compute_gramian(jacobian, 1), jacobian @ jacobian.T)


def test_second_half_of_a_generalized_gramian_runs_in_reverse() -> None:
    jacobian = _randn(2, 3, 7)
    gramian = compute_gramian(jacobian, 1)
    assert gramian.shape == (2, 3, 3, 2)
    for i in range(2):
        for j in range(3):
            for k in range(3):
                for n in range(2):
                    assert_close(gramian[i, j, k, n], jacobian[i, j] @ jacobian[n, k])


@pytest.mark.parametrize(
    ("contracted", "shape"),
    [
        (-1, (2, 2)),
        (-2, (2, 3, 3, 2)),
        (-3, (2, 3, 4, 4, 3, 2)),
        (0, (2, 3, 4, 4, 3, 2)),
        (1, (2, 3, 3, 2)),
        (2, (2, 2)),
        (3, ()),
    ],
)
def test_contracted_dims(contracted: int, shape: tuple[int, ...]) -> None:
    tensor = _randn(2, 3, 4)
    gramian = compute_gramian(tensor, contracted)
    kept = len(shape) // 2
    rows = tensor.reshape(*tensor.shape[:kept], -1)
    letters = "abc"[:kept]
    subscripts = f"{letters}z,{letters.upper()}z->{letters}{letters.upper()[::-1]}"
    assert gramian.shape == shape
    assert_close(gramian, torch.einsum(subscripts, rows, rows))


def test_gramian_of_vectors_and_scalars() -> None:
    vector = _randn(4)
    assert_close(compute_gramian(vector), torch.outer(vector, vector))
    assert_close(compute_gramian(vector, 1), vector @ vector)
    assert_close(compute_gramian(torch.tensor(3.0), 0), torch.tensor(9.0))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    assert torch.equal(compute_gramian(torch.ones(shape)), torch.zeros(shape[0], shape[0]))


@pytest.mark.parametrize("contracted", [3, -3])
def test_too_many_dimensions_are_refused(contracted: int) -> None:
    with pytest.raises(ValueError, match="contracted_dims"):
        compute_gramian(_randn(2, 3), contracted)


@pytest.mark.parametrize("half_shape", [(), (4,), (2, 3), (3, 2), (2, 3, 4), (2, 0)])
def test_flatten_orders_rows_and_columns_alike(half_shape: tuple[int, ...]) -> None:
    jacobian = _randn(*half_shape, 5)
    rows = jacobian.reshape(-1, 5)
    generalized = compute_gramian(jacobian, 1)
    flat = flatten_gramian(generalized)
    assert_close(flat, rows @ rows.T)
    assert torch.equal(unflatten_gramian(flat, half_shape), generalized)


def test_flatten_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="second half"):
        flatten_gramian(torch.ones(2, 3, 2, 3))


def test_normalize_and_regularize() -> None:
    gramian = compute_gramian(_randn(3, 5))
    assert_close(normalize(gramian, 1e-4), gramian / gramian.trace())
    assert_close(regularize(gramian, 0.5), gramian + 0.5 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_normalize_of_zero_is_zero(eps: float) -> None:
    zero = compute_gramian(torch.zeros(3, 2))
    assert torch.equal(normalize(zero, eps), torch.zeros(3, 3))


def test_normalize_drops_to_zero_below_eps() -> None:
    gramian = compute_gramian(torch.full((1, 1), 0.5))
    assert normalize(gramian, 0.25) == 1.0
    assert normalize(gramian, 0.2500001) == 0.0


def test_shape_checks() -> None:
    assert is_matrix(torch.ones(2, 3))
    assert not is_matrix(torch.ones(2))
    assert is_psd_matrix(torch.ones(2, 2))
    assert not is_psd_matrix(torch.ones(2, 3))
    assert not is_psd_matrix(torch.ones(2, 2, 2, 2))
    assert is_psd_tensor(torch.ones(()))
    assert is_psd_tensor(torch.ones(2, 3, 3, 2))
    assert not is_psd_tensor(torch.ones(2, 3, 2, 3))
    assert not is_psd_tensor(torch.ones(2, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_squared_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gramian, "_CHUNK", 7)
    rows = (100.0 * torch.randn(4, 30, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = compute_gramian(rows)
    assert found.dtype == torch.float32
    exact = rows.double() @ rows.double().T
    # 30 products, each of at most the largest square, summed in float32.
    bound = 30 * torch.finfo(torch.float32).eps * float(exact.max())
    assert float((found - exact).abs().max()) <= bound
    assert compute_gramian(rows[:, :0]).equal(torch.zeros(4, 4))
