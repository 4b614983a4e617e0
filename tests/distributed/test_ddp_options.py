"""DDP's own options and conventions: each is exact, or would have been silently wrong."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import Shard

from jddist import attach, verify
from jddist.aggregation import UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autojac import backward
from jddist.errors import UnsupportedModelError
from tests._oracle import gramian as gramian_of
from tests._oracle import jacobian, relative_error, weighted_gradient
from tests._ranks import run_ranks
from tests.distributed._training import (
    LOSSES,
    flatten,
    local_part,
    make_data,
    make_network,
    parameters_of,
    reference,
    set_gradients,
    wrap,
)

BOUND = 1e-10

OPTIONS: dict[str, dict[str, object]] = {
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "bucket view": {"gradient_as_bucket_view": True},
    "static bucket view": {"static_graph": True, "gradient_as_bucket_view": True},
    "tiny buckets": {"bucket_cap_mb": 0.0001},
}


def _with_options(rank: int, world_size: int) -> dict[str, Tensor]:
    found = {}
    for name, options in OPTIONS.items():
        model = make_network()
        ddp = wrap(model, **options)
        x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())
        engine = Engine(ddp, batch_dim=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            engine.backward(LOSSES["instance"](ddp(x), y), UPGradWeighting())
            optimizer.step()
        found[name] = parameters_of(model)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_options_of_ddp_change_nothing(world_size: int) -> None:
    expected = reference("instance", "sgd")["parameters"][-1]
    for found in run_ranks(_with_options, world_size):
        for name in OPTIONS:
            assert relative_error(found[name], expected) <= BOUND, name


def _ordinary_steps_in_between(rank: int, world_size: int) -> list[Tensor]:
    """Gramians without a backward, and plain backwards, mixed with steps."""
    grads = []
    for options in ({}, {"static_graph": True}):
        model = make_network()
        ddp = wrap(model, **options)
        x, y = (local_part(t, rank, world_size, "even") for t in make_data())
        engine = Engine(ddp, batch_dim=0)
        for _ in range(3):
            engine.compute_gramian(LOSSES["instance"](ddp(x), y)) if not options else None
            model.zero_grad()
            losses = LOSSES["instance"](ddp(x), y)
            engine.compute_gramian(losses)
            losses.sum().backward()
            grads.append(flatten([p.grad for p in model.parameters()]))
    return grads


def test_an_ordinary_backward_stays_synchronised_after_a_gramian() -> None:
    ranks = run_ranks(_ordinary_steps_in_between, 2)
    model, (x, y) = make_network(), make_data()
    LOSSES["instance"](model(x), y).sum().backward()
    expected = flatten([p.grad for p in model.parameters()]) / 2  # DDP's mean over two ranks
    for found in ranks:
        for grad in found:
            assert relative_error(grad, expected) <= BOUND


MICRO = 3


def _accumulate(rank: int, world_size: int) -> Tensor:
    model = make_network()
    ddp = wrap(model)
    engine = Engine(ddp, batch_dim=0)
    x, y = make_data()
    for step in range(MICRO):
        last = step == MICRO - 1
        micro = slice(3 * step, 3 * step + 3)
        local_x, local_y = (local_part(t[micro], rank, world_size, "uneven") for t in (x, y))
        with contextlib.nullcontext() if last else ddp.no_sync():
            engine.backward(LOSSES["instance"](ddp(local_x), local_y), UPGradWeighting())
    return flatten([p.grad for p in model.parameters()])


def test_no_sync_accumulates_the_weighted_gradients() -> None:
    model, (x, y) = make_network(), make_data()
    total = 0
    for step in range(MICRO):
        micro = slice(3 * step, 3 * step + 3)
        rows = jacobian(LOSSES["instance"](model(x[micro]), y[micro]), list(model.parameters()))
        total = total + UPGradWeighting()(rows @ rows.T) @ rows
    for found in run_ranks(_accumulate, 2):
        assert relative_error(found, total) <= BOUND


def _sum_hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP looks at the annotations
    work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _communication_hooks(rank: int, world_size: int) -> list[Tensor]:
    found = []
    for hook, divisor in ((allreduce_hook, None), (_sum_hook, 1)):
        model = make_network()
        ddp = wrap(model)
        ddp.register_comm_hook(None, hook)
        x, y = (local_part(t, rank, world_size, "even") for t in make_data())
        engine = Engine(ddp, batch_dim=0)
        if divisor is not None:
            engine.distribution.divisor = divisor
        engine.backward(LOSSES["instance"](ddp(x), y), UPGradWeighting())
        found.append(flatten([p.grad for p in model.parameters()]))
    return found


def test_the_factor_follows_the_wrappers_reduction() -> None:
    model, (x, y) = make_network(), make_data()
    rows = jacobian(LOSSES["instance"](model(x), y), list(model.parameters()))
    expected = UPGradWeighting()(rows @ rows.T) @ rows
    for found in run_ranks(_communication_hooks, 2):
        for grad in found:
            assert relative_error(grad, expected) <= BOUND


class Branches(nn.Module):
    """Every rank takes its own branch."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(5, 6)
        self.branches = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)])

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.branches[which](torch.tanh(self.shared(x)))


def _branches(rank: int, world_size: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Branches().double()
    ddp = wrap(model, find_unused_parameters=True)
    engine = Engine(ddp, batch_dim=0)
    x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())
    losses = LOSSES["instance"](ddp(x, rank % 2), y)
    gramian = engine.compute_gramian(losses)
    weights = engine.compute_weights(gramian, UPGradWeighting())
    losses.backward(engine.local_weights(weights))
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return {"gramian": gramian, "grad": flatten(grads)}


def test_ranks_may_take_different_branches() -> None:
    torch.manual_seed(0)
    model, (x, y) = Branches().double(), make_data()
    losses = torch.cat(
        [
            LOSSES["instance"](model(local_part(x, r, 3, "uneven"), r % 2), part)
            for r, part in enumerate(local_part(y, r, 3, "uneven") for r in range(3))
        ]
    )
    rows = jacobian(losses, list(model.parameters()))
    gramian = rows @ rows.T
    for found in run_ranks(_branches, 3):
        assert relative_error(found["gramian"], gramian) <= BOUND
        assert relative_error(found["grad"], UPGradWeighting()(gramian) @ rows) <= BOUND


def _engine_on_the_inner_module(rank: int, world_size: int) -> dict[str, object]:
    model = make_network()
    ddp = wrap(model)
    attach(ddp)
    engine = Engine(ddp.module.modules(), batch_dim=0)
    x, y = (local_part(t, rank, world_size, "even") for t in make_data())
    gramian = engine.compute_gramian(LOSSES["instance"](ddp(x), y))
    errors = verify(ddp, lambda: LOSSES["instance x task"](ddp(x), y), batch_dim=0)
    tasks = verify(ddp, lambda: LOSSES["task"](ddp(x), y), batch_dim=None, count=len(x))
    return {"gramian": gramian, "errors": errors, "tasks": tasks}


def test_engine_on_the_inner_modules_of_an_attached_wrapper_and_verify() -> None:
    model, (x, y) = make_network(), make_data()
    rows = jacobian(LOSSES["instance"](model(x), y), list(model.parameters()))
    for found in run_ranks(_engine_on_the_inner_module, 2):
        assert relative_error(found["gramian"], rows @ rows.T) <= BOUND
        for errors in (found["errors"], found["tasks"]):
            assert set(errors) == {"first", "norm", "twice", "last"}
            assert all(error <= BOUND for error in errors.values())


class TwoHeads(nn.Module):
    """The losses use the first output alone."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(torch.tanh(self.trunk(x))) for head in self.heads]


HEAD_OPTIONS: dict[str, dict[str, bool]] = {
    "plain": {},
    "static": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
}
HEAD_STEPS = 3


def _head_weights() -> Tensor:
    return torch.linspace(0.5, 2.0, len(make_data()[0]), dtype=torch.float64)


def _unused_output(rank: int, world_size: int) -> dict[tuple[str, str], list[Tensor | str]]:
    found: dict[tuple[str, str], list[Tensor | str]] = {}
    x, y = (local_part(t, rank, world_size, "even") for t in make_data())
    given = _head_weights()
    for option, options in HEAD_OPTIONS.items():
        for way in ("backward", "weights", "callable", "by hand"):
            torch.manual_seed(0)
            model = TwoHeads().double()
            ddp = wrap(model, **options)
            engine = Engine(ddp, batch_dim=0)
            steps = found.setdefault((option, way), [])
            for _ in range(HEAD_STEPS):
                model.zero_grad()
                try:
                    losses = LOSSES["instance"](ddp(x)[0], y)
                    if way == "callable":
                        engine.backward(losses, lambda gramian: given)
                    elif way == "weights":
                        engine.backward(losses, given)
                    elif way == "backward":
                        engine.backward(
                            losses, given, backward=lambda losses, weights: losses.backward(weights)
                        )
                    else:
                        engine.compute_gramian(losses)
                        losses.backward(engine.local_weights(given))
                except RuntimeError:
                    steps.append("DDP's own")
                    break
                except UnsupportedModelError as error:
                    steps.append(str(error))
                    break
                grads = [
                    torch.zeros_like(p) if p.grad is None else p.grad for p in ddp.parameters()
                ]
                steps.append(flatten(grads))
    return found


def test_outputs_without_objectives_are_exact_or_refused() -> None:
    """DDP waits for the gradients of what the forward reached; with a static graph, from the second
    step on. What it did not average must not pass for a gradient."""
    torch.manual_seed(0)
    model, (x, y) = TwoHeads().double(), make_data()
    rows = jacobian(LOSSES["instance"](model(x)[0], y), list(model.parameters()))
    expected = _head_weights() @ rows
    for found in run_ranks(_unused_output, 2):
        for (option, way), steps in found.items():
            refused = steps[-1] if isinstance(steps[-1], str) else None
            grads = [step for step in steps if isinstance(step, Tensor)]
            if way == "by hand" and option != "unused":
                # The caller's own backward, as DDP does it: one step passes, the next forward not.
                assert refused == "DDP's own" and len(grads) == 1 + (option == "static")
                continue
            for grad in grads:
                assert relative_error(grad, expected) <= BOUND, (option, way)
            if option == "unused" or (option, way) == ("plain", "callable"):
                assert refused is None and len(grads) == HEAD_STEPS
            else:
                assert refused is not None and "find_unused_parameters=True" in refused
                assert len(grads) == (option == "static"), (option, way)


def _penalized(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    losses = LOSSES["instance"](model(x), y)
    (gradient,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    return losses + gradient.square().sum(dim=1)


def _gradient_penalty(rank: int, world_size: int) -> dict[str, list[Tensor | str]]:
    warnings.filterwarnings("ignore", message="The parameters")  # read by the inner backward too
    found: dict[str, list[Tensor | str]] = {}
    x, y = (local_part(t, rank, world_size, "even") for t in make_data())
    given = _head_weights()
    cases = {
        "plain": ({}, lambda gramian: given),
        "static": ({"static_graph": True}, lambda gramian: given),
        "static, weights": ({"static_graph": True}, given),
        "static, begun": ({"static_graph": True}, lambda gramian: given),
    }
    for name, (options, weighting) in cases.items():
        model = make_network()
        ddp = wrap(model, **options)
        engine = Engine(ddp, batch_dim=0)
        if name == "static, begun":  # Without the inner differentiation, and with it afterwards.
            LOSSES["instance"](ddp(x), y).mean().backward()
        found[name] = []
        for _ in range(2):
            model.zero_grad()
            try:
                if name == "static, begun":
                    engine.backward(LOSSES["instance"](ddp(x), y), weighting)
                else:
                    engine.backward(_penalized(ddp, x, y), weighting)
            except UnsupportedModelError as error:
                found[name].append(str(error))
                break
            found[name].append(flatten([p.grad for p in model.parameters()]))
    return found


def test_a_gradient_penalty_is_exact_or_refused() -> None:
    """A static graph takes the inner differentiation for its first backward, and never reduces."""
    model, (x, y) = make_network(), make_data()
    penalized = _head_weights() @ jacobian(_penalized(model, x, y), list(model.parameters()))
    rows = jacobian(LOSSES["instance"](model(x), y), list(model.parameters()))
    for found in run_ranks(_gradient_penalty, 2):
        for name, expected in (("plain", penalized), ("static, begun", _head_weights() @ rows)):
            assert len(found[name]) == 2
            for grad in found[name]:
                assert relative_error(grad, expected) <= BOUND, name
        for name in ("static", "static, weights"):
            (message,) = found[name]
            assert isinstance(message, str) and "static_graph=False" in message


def _empty_losses_of_a_dummy_sample(rank: int, world_size: int) -> Tensor:
    """A model that cannot forward an empty batch: a rank without data passes losses[:0]."""
    model = make_network()
    ddp = wrap(model)
    engine = Engine(ddp, batch_dim=0)
    x, y = (local_part(t, rank, world_size, "empty") for t in make_data())
    if len(x) == 0:
        losses = LOSSES["instance"](ddp(torch.ones(1, 5).double()), torch.ones(1, 4).double())[:0]
    else:
        losses = LOSSES["instance"](ddp(x), y)
    engine.backward(losses, UPGradWeighting())
    assert all(p.grad is not None for p in model.parameters())
    return flatten([p.grad for p in model.parameters()])


def test_a_rank_without_data_passes_an_empty_slice() -> None:
    model, (x, y) = make_network(), make_data()
    rows = jacobian(LOSSES["instance"](model(x), y), list(model.parameters()))
    expected = UPGradWeighting()(rows @ rows.T) @ rows
    for found in run_ranks(_empty_losses_of_a_dummy_sample, 3):
        assert relative_error(found, expected) <= BOUND


def _torchjd_weighting(rank: int, world_size: int) -> list[Tensor]:
    torchjd = pytest.importorskip("torchjd.aggregation")
    model = make_network()
    ddp = wrap(model)
    engine = Engine(ddp, batch_dim=0)
    x, y = (local_part(t, rank, world_size, "even") for t in make_data())
    mine = engine.backward(LOSSES["instance"](ddp(x), y), UPGradWeighting())
    theirs = engine.backward(LOSSES["instance"](ddp(x), y), torchjd.UPGradWeighting())
    norms = engine.backward(LOSSES["instance"](ddp(x), y), lambda g: 1 / g.diagonal().sqrt())
    return [mine, theirs, norms]


def test_any_callable_serves_as_weighting() -> None:
    pytest.importorskip("torchjd")
    ranks = run_ranks(_torchjd_weighting, 2)
    for mine, theirs, norms in ranks:
        assert relative_error(theirs, mine) <= BOUND
        assert torch.equal(norms, ranks[0][2])


def _instance_wise_autojac(rank: int, world_size: int) -> Tensor:
    model = make_network()
    ddp = wrap(model)
    attach(ddp, objectives=Shard(0))
    x, y = (local_part(t, rank, world_size, "empty") for t in make_data())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        backward(LOSSES["instance"](ddp(x), y), UPGrad())
        optimizer.step()
    return parameters_of(model)


@pytest.mark.parametrize("world_size", [2, 3])
def test_backward_with_an_aggregator_takes_the_global_step(world_size: int) -> None:
    expected = reference("instance", "sgd")["parameters"][-1]
    for found in run_ranks(_instance_wise_autojac, world_size):
        assert relative_error(found, expected) <= BOUND


def test_the_reference_is_gradient_descent_on_weighted_rows() -> None:
    """The reference of these tests, checked against a backward of the weighted losses."""
    model, (x, y) = make_network(), make_data()
    losses = LOSSES["instance"](model(x), y)
    rows = jacobian(losses, list(model.parameters()))
    weights = UPGradWeighting()(rows @ rows.T)
    set_gradients(model, weights @ rows)
    by_rows = flatten([p.grad for p in model.parameters()])
    model.zero_grad()
    losses.backward(weights)
    assert relative_error(by_rows, flatten([p.grad for p in model.parameters()])) <= BOUND


def _nobody_has_data(rank: int, world_size: int) -> dict[str, object]:
    model = make_network()
    ddp = wrap(model)
    engine = Engine(ddp, batch_dim=0)
    x, y = (t[:0] for t in make_data())
    weights = engine.backward(LOSSES["instance"](ddp(x), y), UPGradWeighting())
    zero = all(p.grad is not None and not p.grad.any() for p in model.parameters())
    attach(ddp, objectives=Shard(0))
    backward(LOSSES["instance"](ddp(x), y), UPGrad())
    still = all(not p.grad.any() for p in model.parameters())
    return {"shape": list(weights.shape), "zero": zero, "still": still}


def test_a_step_without_any_data_is_a_step_of_zero() -> None:
    for found in run_ranks(_nobody_has_data, 2):
        assert found == {"shape": [0], "zero": True, "still": True}


class Sequences(nn.Module):
    """Ranks may have sequences of different lengths, and call a layer more or less often."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, repeats: int) -> Tensor:
        hidden = torch.tanh(self.embed(x))
        for _ in range(repeats):
            hidden = torch.tanh(self.norm(self.mix(hidden)))
        return self.head(hidden.mean(dim=1))


def _sequence(rank: int) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(20 + rank)
    length, repeats = 2 + 3 * rank, 1 + rank % 2
    return torch.randn(2 + rank, length, 5, generator=generator, dtype=torch.float64), repeats


def _sequences(rank: int, world_size: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Sequences().double()
    ddp = wrap(model)
    engine = Engine(ddp, batch_dim=-1)
    losses = ddp(*_sequence(rank)).pow(2).T  # [tasks, samples]
    gramian = engine.compute_gramian(losses)
    weights = torch.arange(1.0, gramian.shape[0] * gramian.shape[1] + 1).double()
    weights = weights.view(gramian.shape[:2])
    engine.backward(losses, weights)
    return {"gramian": gramian, "grad": flatten([p.grad for p in model.parameters()])}


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_may_have_different_lengths_and_repetitions(world_size: int) -> None:
    torch.manual_seed(0)
    model = Sequences().double()
    losses = torch.cat([model(*_sequence(r)).pow(2) for r in range(world_size)]).T
    expected = gramian_of(losses, model.parameters())
    weights = torch.arange(1.0, losses.numel() + 1).double().view_as(losses)
    gradient = weighted_gradient(losses, weights, model.parameters())
    for found in run_ranks(_sequences, world_size):
        assert relative_error(found["gramian"], expected) <= BOUND
        assert relative_error(found["grad"], gradient) <= BOUND


def _uneven_without_counts(rank: int, world_size: int) -> dict[str, object]:
    model = make_network()
    ddp = wrap(model)
    engine = Engine(ddp, batch_dim=None)
    x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())
    with pytest.warns(UserWarning, match=r"different batch sizes .*Pass count="):
        gramian = engine.compute_gramian(LOSSES["task"](ddp(x), y))
    again = engine.compute_gramian(LOSSES["task"](ddp(x), y))  # once is enough
    return {"gramian": gramian, "same": bool(torch.equal(gramian, again))}


def test_uneven_batches_without_counts_are_announced_once() -> None:
    model, data = make_network(), make_data()
    means = []
    for rank in range(2):
        x, y = (local_part(t, rank, 2, "uneven") for t in data)
        means.append(LOSSES["task"](model(x), y))
    expected = gramian_of(torch.stack(means).mean(dim=0), model.parameters())
    for found in run_ranks(_uneven_without_counts, 2):
        assert relative_error(found["gramian"], expected) <= BOUND
        assert found["same"]
