"""What an engine refuses, when, and in which words; nothing is changed by what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jddist.aggregation import UPGradWeighting
from jddist.autogram import Engine
from jddist.errors import ModifiedInputError, NonFiniteObjectiveError, UnsupportedModelError
from tests._oracle import gramian, relative_error
from tests.unit.autogram._common import (
    Offset,
    assert_exact,
    data,
    losses_of,
    slow_way,
    small_model,
)

_REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch_norm": (lambda: nn.BatchNorm1d(5), "GroupNorm"),
    "sync_batch_norm": (lambda: nn.SyncBatchNorm(5), "GroupNorm"),
    "batch_norm_without_parameters": (lambda: nn.BatchNorm1d(5, affine=False), "GroupNorm"),
    "batch_norm_without_statistics": (
        lambda: nn.BatchNorm1d(5, track_running_stats=False).eval(),
        "track its statistics",
    ),
    "rnn": (lambda: nn.RNN(5, 5), "batch_dim=None"),
    "lstm": (lambda: nn.LSTM(5, 5, batch_first=True), "batch_dim=None"),
    "gru": (lambda: nn.GRU(5, 5), "batch_dim=None"),
    "instance_norm": (
        lambda: nn.InstanceNorm1d(5, affine=True, track_running_stats=True),
        "track_running_stats=False",
    ),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_modules_that_mix_samples_are_refused_at_construction(name: str) -> None:
    make, fix = _REFUSED[name]
    model = nn.Sequential(nn.Linear(6, 5), nn.Sequential(make()))
    with pytest.raises(ValueError, match=rf"module '1\.0' \({type(make()).__name__}\).*{fix}"):
        Engine(model, batch_dim=0)
    Engine(model, batch_dim=None)


def test_batch_norm_in_eval_mode_is_accepted_until_it_trains() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double().eval()
    engine = Engine(model, batch_dim=0)
    assert_exact(engine, losses_of(model(data())), model.parameters())
    model.train()
    losses = losses_of(model(data()))
    with pytest.raises(UnsupportedModelError, match="module '1' .*training mode"):
        engine.compute_gramian(losses)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no .*parameters"):
        Engine(nn.Sequential(nn.Tanh()), batch_dim=0)
    with pytest.raises(ValueError, match="no .*parameters"):
        Engine([nn.Sequential(nn.Linear(2, 2))], batch_dim=0)
    with pytest.raises(ValueError, match="no .*parameters"):
        Engine(nn.Linear(2, 2).requires_grad_(False), batch_dim=0)


def test_what_is_no_module_is_refused() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="Found a Parameter among the modules"):
        Engine(model.parameters(), batch_dim=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nonfinite='sometimes'"):
        Engine(model, batch_dim=0, nonfinite="sometimes")  # type: ignore[arg-type]


class _Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (3, 2))
        out: Tensor = self.attention(x, x, x)[0]
        return out.flatten(1)


@pytest.mark.parametrize("first", [Offset(6), _Attends()])
def test_parameters_changed_in_place_before_the_gramian_are_refused(first: nn.Module) -> None:
    """By autograd: also at a step whose rows are not checked, where the first pass ends above the
    module that runs once more."""
    model = nn.Sequential(first, nn.Linear(6, 3)).double()
    engine = Engine(model, batch_dim=0)
    for _ in range(2):
        assert_exact(engine, losses_of(model(data())), model.parameters())
    losses = losses_of(model(data()))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        engine.compute_gramian(losses)


@pytest.mark.parametrize("batch_dim", [0, None])
def test_complex_parameters_are_refused_by_name(batch_dim: int | None) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3, bias=False, dtype=torch.complex128))
    with pytest.raises(UnsupportedModelError, match=r"complex parameters: 1\.weight;.*real"):
        Engine(model, batch_dim=batch_dim)


@pytest.mark.parametrize(("layer", "name"), [(nn.Linear(6, 6), "0"), (Offset(6), "0")])
def test_an_input_changed_in_place_is_refused_by_name(layer: nn.Module, name: str) -> None:
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3)).double()
    engine = Engine(model, batch_dim=0)
    x = data()
    losses = losses_of(model(x))
    x.mul_(2.0)
    with pytest.raises(ModifiedInputError, match=rf"'{name}'"):
        engine.compute_gramian(losses)
    assert_exact(engine, losses_of(model(x)), model.parameters())


def test_an_activation_changed_in_place_is_refused_by_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 5)
            self.left = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.stem(x).tanh() * 1.0
            left: Tensor = self.left(hidden)
            return left + hidden.mul_(2.0)[:, :3]

    model = Model().double()
    engine = Engine(model, batch_dim=0)
    losses = losses_of(model(data()))
    with pytest.raises(ModifiedInputError, match="'left'"):
        engine.compute_gramian(losses)


def test_reentrant_checkpoints_are_refused() -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    x = data().requires_grad_()
    losses = losses_of(model[3](checkpoint(model[:3], x, use_reentrant=True)))
    # They hide their parameters from the graph: without an error, rows would be missing.
    with pytest.raises((ValueError, RuntimeError), match="use_reentrant"):
        engine.compute_gramian(losses)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_loss_that_is_not_finite(bad: float, batch_dim: int | None) -> None:
    model = small_model()
    engine = Engine(model, batch_dim=batch_dim)
    x = data()
    x[2, 0] = bad
    with pytest.raises(NonFiniteObjectiveError, match="2"):
        engine.backward(losses_of(model(x)), UPGradWeighting())
    assert all(p.grad is None for p in model.parameters())

    engine = Engine(model, batch_dim=batch_dim, nonfinite="skip")
    with pytest.warns(UserWarning, match="weights of this step are zero"):
        weights = engine.backward(losses_of(model(x)), UPGradWeighting())
    assert torch.equal(weights, torch.zeros(4, dtype=torch.float64))
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    # The next step is an ordinary one again.
    assert engine.backward(losses_of(model(data())), UPGradWeighting()).all()


def test_a_finite_loss_with_an_infinite_gradient_is_noticed() -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    output = model(data())
    losses = (output - output.detach()).abs().sum(1).sqrt()  # 0, with an infinite slope
    assert torch.isfinite(losses).all()
    with pytest.raises(NonFiniteObjectiveError):
        engine.compute_gramian(losses)


def test_weights_of_wrong_shapes_are_refused() -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    matrix = model(data())
    with pytest.raises(RuntimeError, match="compute_gramian"):
        engine.local_weights(torch.ones(4))
    gramian = engine.compute_gramian(matrix)
    with pytest.raises(ValueError, match=r"\(4, 3, 3, 4\).*Flattening\(UPGradWeighting"):
        engine.compute_weights(gramian, UPGradWeighting())
    with pytest.raises(ValueError, match=r"shape \(12,\).*\(4, 3\)"):
        engine.compute_weights(gramian, lambda g: torch.ones(12))
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        engine.local_weights(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"shape \(12,\)"):
        engine.backward(matrix, torch.ones(12))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_embeddings_are_refused(layer: type[nn.Module], batch_dim: int | None) -> None:
    kwargs = {"mode": "sum"} if layer is nn.EmbeddingBag else {}
    model = nn.Sequential(layer(5, 3, sparse=True, **kwargs))
    with pytest.raises(UnsupportedModelError, match="'0' .*sparse=False"):
        Engine(model, batch_dim=batch_dim)


def test_gradients_scaled_by_frequency_are_exact_in_one_process() -> None:
    """They mix the samples: a token's gradient depends on how often the batch has it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, scale_grad_by_freq=True), nn.Flatten()).double()
    tokens = torch.randint(0, 5, (4, 3))
    for batch_dim in (0, None):
        engine = Engine(model, batch_dim=batch_dim)
        losses = losses_of(model(tokens))
        with slow_way(announced=False):
            found = engine.compute_gramian(losses)
        assert relative_error(found, gramian(losses, model.parameters())) <= 1e-10
