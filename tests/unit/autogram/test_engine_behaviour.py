"""How an engine is used: training loops, parts of models, several engines, several forwards."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from jddist.aggregation import Flattening, UPGrad, UPGradWeighting
from jddist.autogram import Engine, assembly
from jddist.autogram.rules import fallback
from tests._oracle import flat_grad, gramian, jacobian, relative_error
from tests.unit.autogram._common import (
    SLOW_WAY,
    Offset,
    assert_exact,
    data,
    losses_of,
    slow_way,
    small_model,
)


def _write_grad(parameters: list[nn.Parameter], gradient: Tensor) -> None:
    pieces = gradient.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.reshape(parameter.shape)


@pytest.mark.parametrize("whole_step", [False, True], ids=["in_steps", "backward"])
def test_training_loop(whole_step: bool) -> None:
    """Instance-wise training as documented; the reference aggregates the oracle's Jacobian."""
    inputs = torch.randn(8, 16, 5, dtype=torch.float64)
    targets = torch.randn(8, 16, dtype=torch.float64)

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    reference = copy.deepcopy(model)
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    optimizer, reference_optimizer = (SGD(m.parameters(), lr=0.1) for m in (model, reference))
    criterion = nn.MSELoss(reduction="none")
    weighting = UPGradWeighting()
    engine = Engine(model.modules(), batch_dim=0)

    for x, target in zip(inputs, targets, strict=True):
        losses = criterion(model(x).squeeze(dim=1), target)
        optimizer.zero_grad()
        if whole_step:
            engine.backward(losses, weighting)
        else:
            weights = weighting(engine.compute_gramian(losses))
            losses.backward(weights)
        optimizer.step()

        losses = criterion(reference(x).squeeze(dim=1), target)
        parameters = list(reference.parameters())
        _write_grad(parameters, UPGrad()(jacobian(losses, parameters)))
        reference_optimizer.step()

    found, expected = (
        torch.cat([p.detach().reshape(-1) for p in m.parameters()]) for m in (model, reference)
    )
    # UPGrad's quadratic programs are solved to 1e-9 or better, and are stable in G (+ reg_eps I).
    assert relative_error(found - start, expected - start) <= 1e-8


def test_several_modules_and_parts_of_a_model() -> None:
    model = small_model()
    first, _, offset, last = model
    x = data()

    engine = Engine(first, offset, last, batch_dim=0)
    assert_exact(engine, losses_of(model(x)), model.parameters())
    engine = Engine(last, first, batch_dim=0)
    assert_exact(engine, losses_of(model(x)), [*first.parameters(), *last.parameters()])
    engine = Engine(offset, batch_dim=0)
    assert_exact(engine, losses_of(model(x)), offset.parameters())
    engine = Engine((m for m in model if m is not offset), batch_dim=0)
    assert_exact(engine, losses_of(model(x)), [*first.parameters(), *last.parameters()])


def test_an_iterable_counts_direct_parameters_only() -> None:
    parent = nn.Sequential(Offset(6), nn.Linear(6, 3)).double()
    own = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    parent.register_parameter("own", own)
    engine = Engine([parent], batch_dim=None)
    losses = losses_of(parent(data())) * own
    assert_exact(engine, losses, [own])


def test_only_the_parts_get_a_gramian_but_all_get_a_gradient() -> None:
    model = small_model()
    engine = Engine(model[0], batch_dim=0)
    losses = losses_of(model(data()))
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    expected = weights @ jacobian(losses, model.parameters())
    engine.backward(losses, weights)
    assert relative_error(flat_grad(model.parameters()), expected) <= 1e-12


def test_two_engines_on_one_module() -> None:
    model = small_model()
    whole = Engine(model, batch_dim=0)
    part = Engine(model[0], batch_dim=None)
    losses = losses_of(model(data()))
    found = [whole.compute_gramian(losses), part.compute_gramian(losses)]
    for gramian_found, module in zip(found, [model, model[0]], strict=True):
        expected = gramian(losses, module.parameters())
        assert relative_error(gramian_found, expected) <= 1e-10
    del whole
    losses = losses_of(model(data(3)))
    assert_exact(part, losses, model[0].parameters())


def test_two_models_in_one_graph() -> None:
    encoder, head = nn.Linear(6, 4).double(), nn.Linear(4, 2).double()
    engines = [Engine(encoder, batch_dim=0), Engine(head, batch_dim=0)]
    losses = losses_of(head(encoder(data()).tanh()))
    found = [engine.compute_gramian(losses) for engine in engines]
    for gramian_found, module in zip(found, [encoder, head], strict=True):
        expected = gramian(losses, module.parameters())
        assert relative_error(gramian_found, expected) <= 1e-10


def test_several_forwards_before_one_gramian() -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    first, second = data(seed=1), data(seed=2)
    siamese = losses_of(model(first) - model(second)) + losses_of(model(second))
    assert_exact(engine, siamese, model.parameters())

    earlier, later = losses_of(model(first)), losses_of(model(second[:3]))
    assert_exact(engine, later, model.parameters())
    assert_exact(engine, earlier, model.parameters())


def test_losses_of_two_forwards_concatenated() -> None:
    """Samples of different calls in one output: no call has all of them."""
    model = small_model()
    engine = Engine(model, batch_dim=0)
    losses = torch.cat([losses_of(model(data(seed=1))), losses_of(model(data(seed=2)))])
    with slow_way(announced=True):
        assert_exact(engine, losses, model.parameters())


def test_the_same_output_twice() -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    losses = losses_of(model(data()))
    before = engine.compute_gramian(losses)
    assert torch.equal(engine.compute_gramian(losses), before)
    losses.sum().backward(retain_graph=True)
    assert_exact(engine, losses, model.parameters())
    model(data())  # after a backward, the next call lets go of what the layers had read
    with slow_way(announced=True):
        assert_exact(engine, losses, model.parameters())


def test_a_forward_before_the_engine_is_slow_but_exact() -> None:
    model = small_model()
    losses = losses_of(model(data()))
    engine = Engine(model, batch_dim=0)
    with slow_way(announced=True):
        assert_exact(engine, losses, model.parameters())
    with slow_way(announced=False):
        assert_exact(engine, losses_of(model(data())), model.parameters())


@pytest.mark.parametrize("batch_dim", [0, None])
def test_frozen_and_unfrozen_after_construction(batch_dim: int | None) -> None:
    model = small_model()
    model[0].weight.requires_grad_(False)
    engine = Engine(model, batch_dim=batch_dim)
    sizes = [len(jacobian(losses_of(model(data())), model.parameters()).T)]
    assert_exact(engine, losses_of(model(data())), model.parameters())
    model[0].weight.requires_grad_(True)
    model[3].requires_grad_(False)
    model[2].offset.requires_grad_(False)
    assert_exact(engine, losses_of(model(data())), model.parameters())
    sizes.append(len(jacobian(losses_of(model(data())), model.parameters()).T))
    assert sizes == [5 + 5 + 15 + 3, 30 + 5]


def test_modes_may_change_between_steps() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    engine = Engine(model, batch_dim=0)
    for training in [True, False, True]:
        model.train(training)
        assert_exact(engine, losses_of(model(data())), model.parameters())


class _BatchCentred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        out: Tensor = self.second(hidden - hidden.mean(0))
        return out


@pytest.mark.parametrize("mix", ["centred", "reversed", "rolled_losses"])
def test_mixed_samples_are_noticed(mix: str) -> None:
    """Nothing in the modules shows it: only the numbers do."""
    torch.manual_seed(0)
    model: nn.Module = _BatchCentred().double() if mix == "centred" else small_model()
    engine = Engine(model, batch_dim=0)
    output = model(data())
    if mix == "reversed":
        output = output.flip(0)
    losses = losses_of(output)
    if mix == "rolled_losses":
        losses = losses + 0.1 * losses.roll(1)
    with slow_way(announced=True):
        assert_exact(engine, losses, model.parameters())


@pytest.mark.parametrize("when", ["before", "after", "after_prepended"])
@pytest.mark.parametrize("layer", [0, 2])
def test_hooks_of_the_user_that_change_a_layer(when: str, layer: int) -> None:
    model = small_model()

    def double(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return 2 * output.sin()

    def shift(_module: nn.Module, args: tuple[Tensor]) -> Tensor:
        return args[0] + 1

    if when == "before":
        model[layer].register_forward_hook(double)
        model[layer].register_forward_pre_hook(shift)
    engine = Engine(model, batch_dim=0)
    if when != "before":
        model[layer].register_forward_hook(double, prepend=when == "after_prepended")
        model[layer].register_forward_pre_hook(shift, prepend=when == "after_prepended")
    with warnings.catch_warnings():
        if when == "after_prepended":
            # The engine then sees what the hook made, not what the layer did: slow, but exact.
            warnings.filterwarnings("ignore", SLOW_WAY)
        assert_exact(engine, losses_of(model(data())), model.parameters())


def test_the_fallback_serves_what_has_no_rule_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered: list[str] = []
    original = fallback.vjp_rows

    def spy(record: assembly.LayerRecord, *args: object, **kwargs: object) -> object:
        entered.append(type(record.module).__name__)
        return original(record, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(fallback, "vjp_rows", spy)
    monkeypatch.setattr(assembly, "vjp_rows", spy)
    model = small_model()
    engine = Engine(model, batch_dim=0)
    assert_exact(engine, losses_of(model(data())), model.parameters())
    assert entered == ["Offset"]


def test_flattening_orders_the_weights_of_a_matrix_of_losses() -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    output = model(data(5)).sin()
    found = engine.compute_weights(engine.compute_gramian(output), Flattening(UPGradWeighting()))
    rows = jacobian(output, model.parameters())
    expected = UPGradWeighting()(rows @ rows.T).reshape(5, 3)
    # Both solve the same quadratic programs to 1e-9 or better.
    assert relative_error(found, expected) <= 1e-8


def test_any_callable_is_a_weighting() -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    losses = losses_of(model(data()))
    found = engine.backward(losses, lambda g: g.diagonal())
    expected = gramian(losses_of(model(data())), model.parameters()).diagonal()
    assert relative_error(found, expected) <= 1e-10


def test_gradients_accumulate() -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    weights = torch.ones(4, dtype=torch.float64)
    losses = losses_of(model(data()))
    engine.backward(losses, weights, retain_graph=True)
    once = flat_grad(model.parameters())
    engine.backward(losses, weights)
    assert relative_error(flat_grad(model.parameters()), 2 * once) <= 1e-14


@pytest.mark.parametrize("batch_dim", [0, None])
def test_losses_on_derivatives_of_the_model(batch_dim: int | None) -> None:
    """A physics-informed loss: the backward of the network is part of the graph, and reads the
    weights where no module is called."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    engine = Engine(model, batch_dim=batch_dim)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    losses = (slope.sum(dim=1) - u.squeeze(1)).square() + u.squeeze(1).square()
    with slow_way(announced=batch_dim == 0):
        assert_exact(engine, losses, model.parameters())


def test_a_parameter_is_its_own_objective() -> None:
    model = nn.ParameterDict({"x": torch.ones(3, dtype=torch.float64)})
    engine = Engine(model, batch_dim=None)
    assert torch.equal(engine.compute_gramian(model["x"]), torch.eye(3, dtype=torch.float64))


class _Changing(nn.Module):
    """Mixes samples from some step on, or reads its layer once more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)
        self.mixing = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x).tanh()
        if self.mixing:
            hidden = hidden - hidden.mean(0)
        out: Tensor = self.head(hidden)
        return out


def test_samples_mixed_from_some_step_on_are_noticed() -> None:
    torch.manual_seed(0)
    model = _Changing().double()
    engine = Engine(model, batch_dim=0)
    for step in range(5):
        model.mixing = step >= 2
        with slow_way(announced=step == 2):
            assert_exact(engine, losses_of(model(data())), model.parameters())


def test_a_penalty_on_the_parameters_from_some_step_on_is_noticed() -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    for step in range(4):
        losses = losses_of(model(data()))
        if step >= 2:
            losses = losses + 0.1 * sum(p.square().sum() for p in model.parameters())
        with slow_way(announced=step == 2):
            assert_exact(engine, losses, model.parameters())


@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_penalty_too_small_for_the_check_of_values_is_noticed(batch_dim: int | None) -> None:
    """2e-8 of the Gramian: the size that rounding has in the check, but not in the result."""
    model = small_model()
    engine = Engine(model, batch_dim=batch_dim)
    penalty = 1e-8 * sum(p.square().sum() for p in model.parameters())
    with slow_way(announced=batch_dim == 0):
        assert_exact(engine, losses_of(model(data())) + penalty, model.parameters())


def test_a_module_that_changes_its_buffers_is_not_repeated() -> None:
    """A spectral norm takes a step of its power iteration in every forward."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        normed = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5))
        models.append(nn.Sequential(normed, nn.Tanh(), nn.Linear(5, 3)).double())
    model, untouched = models
    engine = Engine(model, batch_dim=0)
    for step in range(4):
        expected = gramian(losses_of(untouched(data())), untouched.parameters())
        with slow_way(announced=step == 0):
            found = engine.compute_gramian(losses_of(model(data())))
        assert relative_error(found, expected) <= 1e-14  # the iteration converges: 1e-7 is wrong
        for buffer, reference in zip(model.buffers(), untouched.buffers(), strict=True):
            assert torch.equal(buffer, reference)


def test_gradients_that_are_zero_at_first_are_checked_again() -> None:
    torch.manual_seed(0)
    model = _Changing().double()
    model.mixing = True
    nn.init.zeros_(model.head.weight)
    engine = Engine(model, batch_dim=0)
    with slow_way(announced=False):  # nothing reaches the inner layer yet: zero is right
        assert_exact(engine, losses_of(model(data())), model.parameters())
    nn.init.ones_(model.head.weight)
    with slow_way(announced=True):
        assert_exact(engine, losses_of(model(data())), model.parameters())


def test_parameters_replaced_after_the_engine_was_created_are_refused() -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with pytest.raises(ValueError, match="Create a new Engine"):
        engine.compute_gramian(losses_of(model(data())))
    engine = Engine(model, batch_dim=0)
    model[3] = nn.Linear(5, 3).double()
    with pytest.raises(ValueError, match="Create a new Engine"):
        engine.compute_gramian(losses_of(model(data())))


class _Lookup(nn.Module):
    """Looks a table up without any batch, and does more with it than add it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table(torch.arange(3)[None])
        out: Tensor = self.head(x + rows.squeeze(0).mean(0)) * rows.square().sum()
        return out


def test_hooks_never_change_what_the_model_computes() -> None:
    torch.manual_seed(0)
    model = _Lookup().double()
    with torch.no_grad():
        expected = model(data())
    engine = Engine(model, batch_dim=0)
    output = model(data())
    assert torch.equal(output, expected)
    with slow_way(announced=True):
        assert_exact(engine, losses_of(output), model.parameters())


def test_a_layer_on_a_vector_as_long_as_the_batch() -> None:
    """A Linear on a parameter of its own, with as many outputs as there are samples."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(4))
            self.project = nn.Linear(4, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(x + self.project(self.token))
            return out

    torch.manual_seed(0)
    model = Tokens().double()
    engine = Engine(model, batch_dim=0)
    x = torch.randn(6, 6, dtype=torch.float64)
    with slow_way(announced=True):
        assert_exact(engine, losses_of(model(x)), model.parameters())
