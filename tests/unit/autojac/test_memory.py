"""What autojac keeps, frees and copies: graphs, identities, and memory that tensors share."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from jddist.autojac import backward, jac, jac_to_grad, mtl_backward


class _Counted(torch.autograd.Function):
    """The identity, which notes every pass through it and how many rows that carried."""

    @staticmethod
    def forward(ctx, x, passes):  # type: ignore[no-untyped-def]
        ctx.passes = passes
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        ctx.passes.append(tuple(grad.shape))
        return grad, None


class _Saved:
    """A saved activation, which a weak reference can watch."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_rows_of_summands_do_not_share_memory() -> None:
    # Autograd hands one tensor to both summands; adding to it twice would give 3 instead of 2.
    a, b = _leaf(3), _leaf(3)
    y = a + b
    for _ in range(2):
        backward(y, retain_graph=True)
    for p in (a, b):
        assert torch.equal(p.jac, 2 * torch.eye(3, dtype=torch.float64))


def test_given_jacobians_are_not_written() -> None:
    a = _leaf(2)
    given = torch.ones(1, 2, dtype=torch.float64)
    y = a + torch.zeros_like(a)  # whose gradient is the given tensor itself
    for _ in range(2):
        backward(y, jac_tensors=given, retain_graph=True)
    assert torch.equal(given, torch.ones_like(given))
    assert torch.equal(a.jac, 2 * torch.ones_like(given))
    (returned,) = jac(y, a, jac_outputs=given)
    returned.zero_()
    assert torch.equal(given, torch.ones_like(given))


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_rows_of_an_expanded_gradient_can_be_added_to(chunk_size: int | None) -> None:
    # The gradient of a sum is one element, expanded: writing to it is an error in torch.
    a = _leaf(4)
    y = a.sum()
    for _ in range(2):
        backward(y, retain_graph=True, parallel_chunk_size=chunk_size)
    assert torch.equal(a.jac, torch.full((1, 4), 2.0, dtype=torch.float64))


def test_gradients_of_task_parameters_do_not_share_memory() -> None:
    w, p, q = _leaf(2), _leaf(2), _leaf(2)
    features = w * 2
    start = torch.ones(2, dtype=torch.float64)
    mtl_backward([p + q + features, features**2], features, grad_tensors=[start, start.clone()])
    p.grad.mul_(3)
    assert torch.equal(start, torch.ones_like(start))
    assert torch.equal(q.grad, torch.ones_like(start))
    features = w * 2
    p.grad = q.grad = None
    mtl_backward([(p + q + features).sum(), features.sum()], features)
    torch.nn.utils.clip_grad_norm_([p, q], 1.0)
    # The norm is 2 = sqrt(4 * 1), and clipping adds 1e-6 to it.
    assert torch.allclose(p.grad, torch.full_like(p, 0.5), rtol=1e-6)
    assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("retain_graph", [False, True])
def test_activations_are_freed_with_the_last_row(
    chunk_size: int | None, retain_graph: bool
) -> None:
    saved: list[weakref.ref[_Saved]] = []

    def pack(tensor: Tensor) -> _Saved:
        kept = _Saved(tensor)
        saved.append(weakref.ref(kept))
        return kept

    a, b = _leaf(3), _leaf(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        shared = torch.tanh(a)
        losses = [(shared * b).sum(), torch.exp(shared).sum(), (shared**2).sum()]
    assert len(saved) >= 4
    backward(losses, retain_graph=retain_graph, parallel_chunk_size=chunk_size)
    gc.collect()
    alive = [ref for ref in saved if ref() is not None]
    assert len(alive) == (len(saved) if retain_graph else 0)


def test_row_by_row_goes_through_one_head_at_a_time() -> None:
    m = 6
    a = _leaf(2)
    passes: list[list[tuple[int, ...]]] = [[] for _ in range(m)]
    losses = [_Counted.apply((a * i).sum(), passes[i]) for i in range(m)]
    backward(losses, parallel_chunk_size=1)
    # The last row goes through all heads, to free them.
    assert [len(p) for p in passes] == [2] * (m - 1) + [1]
    expected = torch.arange(m, dtype=torch.float64).unsqueeze(1).expand(m, 2)
    assert torch.equal(a.jac, expected)


def test_the_identity_is_made_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    original = Tensor.new_zeros

    def new_zeros(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        nonlocal largest
        made = original(self, *args, **kwargs)  # type: ignore[arg-type]
        largest = max(largest, made.numel())
        return made

    a = _leaf(50)
    expected = torch.diag(torch.cos(a.detach()))
    monkeypatch.setattr(Tensor, "new_zeros", new_zeros)
    (found,) = jac(torch.sin(a), a, parallel_chunk_size=4)
    assert torch.equal(found, expected)
    assert 0 < largest <= 4 * 50


@pytest.mark.parametrize("retain_jac", [False, True])
@pytest.mark.parametrize("optimize", [False, True])
def test_jacobians_are_freed_before_the_weighting_runs(retain_jac: bool, optimize: bool) -> None:
    from jddist.aggregation import UPGrad

    a, b = _leaf(3), _leaf(2, 2)
    for p in (a, b):
        p.jac = torch.randn(2, *p.shape, dtype=p.dtype)
    seen = []
    aggregator = UPGrad()
    aggregator.gramian_weighting.register_forward_hook(lambda *_: seen.append(hasattr(a, "jac")))
    jac_to_grad([a, b], aggregator, retain_jac=retain_jac, optimize_gramian_computation=optimize)
    assert seen == [retain_jac]
    assert hasattr(b, "jac") == retain_jac
