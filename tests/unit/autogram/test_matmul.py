"""Products of matrices are the same whichever library forms them."""

import pytest
import torch
from torch import Tensor

from jddist.autogram.blocks import matmul
from jddist.autogram.blocks.matmul import put_product, times_transposed
from jddist.autogram.blocks.products import add_square


def _dense(m: int, n: int) -> Tensor:
    return torch.randn(m, n)


def _transposed(m: int, n: int) -> Tensor:
    return torch.randn(n, m).T


def _with_gaps(m: int, n: int) -> Tensor:
    return torch.randn(m, n + 3)[:, :n]


def _expanded(m: int, n: int) -> Tensor:
    return (torch.arange(m) % 8 + 1.0)[:, None].expand(m, n)


LAYOUTS = [_dense, _transposed, _with_gaps, _expanded]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """What oneDNN was given; empty if this build has no such function. Small products count."""
    monkeypatch.setattr(matmul.faster_product, "__defaults__", (matmul.SMALL_SQUARE,))
    found: list[torch.Size] = []
    product = matmul._of_onednn()
    if product is not None:

        def counted(left: Tensor, right: Tensor) -> Tensor:
            found.append(left.shape)
            return product(left, right)

        monkeypatch.setattr(matmul, "_of_onednn", lambda: counted)
    return found


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(64, 70, 600), (64, 64, 5000), (1, 300, 700), (300, 1, 7000), (2, 3, 4)]
)
def test_product_is_the_one_of_float64(left, right, shape, calls) -> None:
    torch.manual_seed(0)
    m, p, n = shape
    a, b = left(m, n), right(p, n)
    expected = a.double() @ b.double().T
    scale = a.double().norm(dim=1)[:, None] * b.double().norm(dim=1)
    for out in (None, lambda: torch.empty(m, p)):
        found = times_transposed(a, b, out)
        assert found.dtype == torch.float32 and found.shape == (m, p)
        assert ((found - expected).abs() / scale).max() <= 1e-6
    target = torch.full((m, p), torch.nan)
    put_product(target, a, b)
    assert ((target - expected).abs() / scale).max() <= 1e-6
    assert bool(calls) == (min(m, p) >= 64 and matmul._of_onednn() is not None)
    assert all(sizes[1] <= 900 for sizes in calls)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [3, 64, 300])
def test_square_is_the_one_of_float64(layout, m, calls) -> None:
    torch.manual_seed(0)
    rows = layout(m, 5000)
    total = torch.ones(m, m, dtype=torch.float64)
    add_square(total, rows)
    expected = 1 + rows.double() @ rows.double().T
    norms = rows.double().norm(dim=1)
    wrong = (total - expected).tril().abs() / (norms[:, None] * norms)
    assert wrong.max() <= 1e-6
    assert bool(calls) == (m >= 64 and matmul._of_onednn() is not None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_the_usual_product(dtype, calls) -> None:
    a, b = torch.randn(64, 600).to(dtype), torch.randn(70, 600).to(dtype)
    assert torch.equal(times_transposed(a, b), a @ b.T)
    assert not calls


def test_without_rows_or_columns(calls) -> None:
    assert times_transposed(torch.randn(0, 5), torch.randn(3, 5)).shape == (0, 3)
    assert torch.equal(times_transposed(torch.randn(2, 0), torch.randn(3, 0)), torch.zeros(2, 3))
    assert not calls


def test_onednn_can_be_switched_off(calls, monkeypatch) -> None:
    a, b = torch.randn(64, 600), torch.randn(70, 600)
    monkeypatch.setattr(type(torch.backends.mkldnn), "enabled", False)
    assert torch.equal(times_transposed(a, b), a @ b.T)
    assert not calls


def test_a_build_with_another_function_of_that_name_is_not_relied_on(monkeypatch) -> None:
    a, b = torch.randn(64, 600), torch.randn(70, 600)

    class Other:
        @staticmethod
        def _linear_pointwise(left: Tensor, right: Tensor, *_: object) -> Tensor:
            return (left @ right.T).neg()

    monkeypatch.setattr(torch.ops, "mkldnn", Other)
    found = matmul._of_onednn.__wrapped__()
    assert found is None
    monkeypatch.setattr(matmul, "_of_onednn", lambda: found)
    assert torch.equal(times_transposed(a, b), a @ b.T)


def test_defaults_do_not_matter() -> None:
    usual = matmul._of_onednn()
    torch.set_default_dtype(torch.float64)
    try:
        found = matmul._of_onednn.__wrapped__()
    finally:
        torch.set_default_dtype(torch.float32)
    assert (found is None) == (usual is None)
