"""What an engine leaves behind: no memory, no hooks, no changed gradients, no drawn numbers."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from jddist.autogram import Engine
from tests._oracle import flat_grad
from tests.unit.autogram._common import Offset, assert_exact, data, losses_of, small_model


class _Watch:
    """Sees the storages of all activations of a forward, without keeping them."""

    def __init__(self, model: nn.Module) -> None:
        self.storages: list[StorageWeakRef] = []
        for module in model.modules():
            module.register_forward_hook(self._note)

    def _note(self, _module: nn.Module, _args: object, output: Tensor) -> None:
        self.storages.append(StorageWeakRef(output.untyped_storage()))

    @property
    def alive(self) -> int:
        return sum(not storage.expired() for storage in self.storages)


@pytest.fixture(autouse=True)
def _no_garbage_collection() -> object:
    """Memory must come back by itself: a cycle keeps a GPU full until Python happens to collect."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
def test_a_validation_forward_leaves_nothing(mode: str) -> None:
    model = small_model()
    watch = _Watch(model)
    engine = Engine(model, batch_dim=0)
    losses = losses_of(model(data()))
    training = len(watch.storages)
    contexts: dict[str, Callable[[], object]] = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
    }
    with contexts[mode]():  # type: ignore[attr-defined]
        validation = model(data(3))
    assert not all(s.expired() for s in watch.storages[training:])
    del validation
    assert all(s.expired() for s in watch.storages[training:])
    assert_exact(engine, losses, model.parameters())


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("end", ["backward", "del"])
def test_a_step_leaves_nothing(batch_dim: int | None, end: str) -> None:
    model = small_model()
    watch = _Watch(model)
    engine = Engine(model, batch_dim=batch_dim)
    losses = losses_of(model(data()))
    if end == "backward":
        # The losses live on, as in a log; the graph is freed by the backward.
        engine.backward(losses, lambda g: g.diagonal())
    else:
        engine.compute_gramian(losses)
        del losses
    assert watch.alive == 0


def test_a_kept_graph_dies_with_its_output() -> None:
    model = small_model()
    watch = _Watch(model)
    engine = Engine(model, batch_dim=0)
    losses = losses_of(model(data()))
    engine.backward(losses, lambda g: g.diagonal(), retain_graph=True)
    assert watch.alive > 0
    del losses
    assert watch.alive == 0


def test_a_failed_forward_leaves_nothing() -> None:
    model = small_model()
    watch = _Watch(model)
    engine = Engine(model, batch_dim=0)

    def fail(_module: nn.Module, _args: object, _output: object) -> None:
        raise ZeroDivisionError

    handle = model[3].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(data())
    handle.remove()
    assert watch.alive == 0
    assert_exact(engine, losses_of(model(data(3))), model.parameters())


def _number_of_hooks(model: nn.Module) -> int:
    kinds = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"]
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_a_deleted_engine_leaves_no_hooks() -> None:
    model = small_model()
    before = _number_of_hooks(model)
    first, second = Engine(model, batch_dim=0), Engine(model[0], batch_dim=None)
    assert _number_of_hooks(model) > before
    losses = losses_of(model(data()))
    first.compute_gramian(losses)
    del first
    assert _number_of_hooks(model) > before
    second.compute_gramian(losses)
    del second
    assert _number_of_hooks(model) == before
    assert losses.requires_grad


def test_a_refused_model_is_left_without_hooks() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    before = _number_of_hooks(model)
    with pytest.raises(ValueError, match="BatchNorm1d"):
        Engine(model, batch_dim=0)
    assert _number_of_hooks(model) == before


def test_an_engine_keeps_no_model_alive_after_both_are_gone() -> None:
    model = small_model()
    storage = StorageWeakRef(next(model.parameters()).untyped_storage())
    engine = Engine(model, batch_dim=0)
    engine.compute_gramian(losses_of(model(data())))
    del engine, model
    gc.collect()  # modules may be in cycles of their own
    assert storage.expired()


def test_ordinary_backwards_are_unchanged() -> None:
    plain, hooked = small_model(), small_model()
    engine = Engine(hooked, batch_dim=0)
    for model in (plain, hooked):
        losses_of(model(data())).sum().backward()
    assert torch.equal(flat_grad(plain.parameters()), flat_grad(hooked.parameters()))

    losses = losses_of(hooked(data()))
    hooked.zero_grad()
    engine.compute_gramian(losses)
    assert all(p.grad is None for p in hooked.parameters())
    losses.sum().backward()
    assert torch.equal(flat_grad(plain.parameters()), flat_grad(hooked.parameters()))


class _NoisyOffset(Offset):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_the_random_numbers_of_the_program_are_unchanged() -> None:
    model = nn.Sequential(nn.Linear(6, 5), _NoisyOffset(5), nn.Linear(5, 2)).double()
    engine = Engine(model, batch_dim=0)
    losses = losses_of(model(data()))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert_exact(engine, losses, model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_state_dict_and_copies_are_unchanged() -> None:
    """An averaged copy of the model (EMA) is made while an engine watches the original."""
    model = small_model()
    names = list(model.state_dict())
    engine = Engine(model, batch_dim=0)
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    losses_of(twin(data())).sum().backward()
    assert_exact(engine, losses_of(model(data())), model.parameters())
    own = Engine(twin, batch_dim=0)
    assert_exact(own, losses_of(twin(data())), twin.parameters())
    assert_exact(engine, losses_of(model(data())), model.parameters())
    del own
    assert_exact(engine, losses_of(model(data())), model.parameters())


def test_the_users_hooks_do_not_run_for_the_gramian() -> None:
    model = small_model()
    calls: list[str] = []
    for module in model:
        module.register_forward_hook(lambda m, _a, _o: calls.append(type(m).__name__))
    engine = Engine(model, batch_dim=0)
    losses = losses_of(model(data()))
    assert calls == ["Linear", "Tanh", "Offset", "Linear"]
    assert_exact(engine, losses, model.parameters())
    assert len(calls) == 4
