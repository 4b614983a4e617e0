"""Recording on several ranks: rank 0 writes, nothing more is sent, and training stays the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jddist import attach, grouping
from jddist.aggregation import UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autojac import jac_to_grad, jac_to_grad_groups, mtl_backward
from jddist.errors import LayoutMismatchError
from jddist.linalg import QuadprogProjector
from jddist.monitoring import Record, Recorder, Run, Spread, Summary, statistics_of
from tests._oracle import jacobian
from tests._ranks import run_ranks
from tests.distributed._sharded import make_mesh, shard
from tests.distributed._spy import spying
from tests.distributed._training import (
    LOSSES,
    SAMPLES,
    TASKS,
    local_part,
    make_data,
    make_network,
    parameters_of,
    wrap,
)

STEPS = 4
NAMES = [f"task {i}" for i in range(TASKS)]
Train = Callable[[DistributedDataParallel, Tensor, Tensor, Recorder | None], list[Tensor]]


def _task_losses(out: Tensor, y: Tensor) -> Tensor:
    """Means over the samples; one of them is to grow, so that there are conflicts."""
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    return (out - y).pow(2).mean(dim=0) * signs


def _engine(ddp: nn.Module, x: Tensor, y: Tensor, recorder: Recorder | None) -> list[Tensor]:
    """Every sample an objective, in whole steps."""
    engine = Engine(ddp, batch_dim=0)
    if recorder is not None:
        recorder.watch(engine)
    return [engine.backward(LOSSES["instance"](ddp(x), y), UPGradWeighting()) for _ in range(STEPS)]


def _tasks(ddp: nn.Module, x: Tensor, y: Tensor, recorder: Recorder | None) -> list[Tensor]:
    """Every task an objective, step by step."""
    engine = Engine(ddp, batch_dim=None)
    if recorder is not None:
        recorder.watch(engine)
    found = []
    for _ in range(STEPS):
        losses = _task_losses(ddp(x), y)
        gramian = engine.compute_gramian(losses, count=len(x))
        found.append(engine.compute_weights(gramian, UPGradWeighting()))
        losses.backward(engine.local_weights(found[-1]))
    return found


def _explicit(ddp: nn.Module, x: Tensor, y: Tensor, recorder: Recorder | None) -> list[Tensor]:
    """Every task an objective, by ``mtl_backward``."""
    aggregator = UPGrad()
    if recorder is not None:
        recorder.watch(aggregator)
    found = []
    attach(ddp)
    for _ in range(STEPS):
        features = ddp(x)
        losses = list(_task_losses(features, y))
        mtl_backward(losses, features=features, count=len(x))
        weights = jac_to_grad(ddp.parameters(), aggregator)
        assert weights is not None
        found.append(weights)
    return found


def _grouped(ddp: nn.Module, x: Tensor, y: Tensor, recorder: Recorder | None) -> list[Tensor]:
    """The same, layer by layer."""
    attach(ddp)
    groups = grouping.per_layer(ddp)
    aggregators = [UPGrad() for _ in groups]
    if recorder is not None:
        recorder.watch(*aggregators)
    found = []
    for _ in range(STEPS):
        features = ddp(x)
        losses = list(_task_losses(features, y))
        mtl_backward(losses, features=features, count=len(x))
        weights = jac_to_grad_groups(groups, aggregators)
        found.append(torch.stack([w for w in weights if w is not None]))
    return found


WAYS: dict[str, Train] = {
    "engine": _engine,
    "tasks": _tasks,
    "explicit": _explicit,
    "grouped": _grouped,
}


def _with_and_without(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for way, train in WAYS.items():
        for kind in ("uneven", "empty"):
            if kind == "empty" and way in ("explicit", "grouped"):
                continue  # a mean of no samples is NaN, which the others leave out by themselves
            x, y = (local_part(t, rank, world_size, kind) for t in make_data())
            logs, weights, grads = [], [], []
            home = Path(folder) / f"{way}-{kind}-{rank}"
            every, names = (1, None) if way == "engine" else (2, NAMES)
            for recorder in (None, Recorder(home, every=every, names=names)):
                ddp = wrap(make_network())
                with spying(rank, world_size) as log:
                    weights.append(train(ddp, x, y, recorder))
                logs.append(list(log))
                grads.append([p.grad for p in ddp.parameters()])
                if recorder is not None:
                    recorder.close()
            assert logs[0] == logs[1], (way, kind)
            for first, second in zip(*weights, strict=True):
                assert torch.equal(first, second)
            for first, second in zip(*grads, strict=True):
                assert torch.equal(first, second)
            result[f"{way}-{kind}"] = {
                "weights": weights[1],
                "log": [sent for _, sent in logs[1]],
                "wrote": home.exists(),
            }
    return result


def _expected(way: str) -> list[Summary]:
    """Brute force on the whole batch, for each group of parameters; without weights."""
    model, (x, y) = make_network(), make_data()
    losses = (LOSSES["instance"] if way == "engine" else _task_losses)(model(x), y)
    groups = grouping.per_layer(model) if way == "grouped" else [list(model.parameters())]
    found = []
    for group in groups:
        rows = jacobian(losses, group)
        weights = UPGradWeighting()(rows @ rows.T).numpy()
        statistics = statistics_of((rows @ rows.T).numpy(), weights)
        found.append(Summary.of("", statistics, each=way != "engine"))
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_rank_zero_writes_and_nothing_more_is_sent(world_size: int, tmp_path: Path) -> None:
    results = run_ranks(_with_and_without, world_size, str(tmp_path))
    for case in results[0]:
        way = case.split("-")[0]
        assert [result[case]["wrote"] for result in results] == [True] + [False] * (world_size - 1)
        run = Run.read(tmp_path / f"{case}-0")
        every = 1 if way == "engine" else 2
        assert [record.step for record in run.records] == list(range(0, STEPS, every))
        assert run.counts["steps"] == STEPS
        assert run.sessions[0].num_ranks == world_size
        # Every step of the engine is on record, and with it every byte that rank 0 sent.
        sent, recorded = sum(results[0][case]["log"]), [r.bytes_sent for r in run.records]
        assert all(0 < size < sent for size in recorded)
        if way == "engine":
            assert sum(recorded) == pytest.approx(sent, rel=1e-12)
        for record in run.records:
            weights = results[0][case]["weights"][record.step]
            for found, expected in zip(record.groups, _expected(way), strict=True):
                _check(found, expected)
            assert record.groups[0].conflict_rate > 0
            if way in ("tasks", "explicit"):
                assert record.groups[0].weights.tolist() == weights.tolist()
            if way == "grouped":
                recorded = np.stack([group.weights for group in record.groups])
                assert recorded.tolist() == weights.tolist()
                assert [g.name for g in record.groups] == ["first", "norm", "twice", "last"]


def _check(found: Summary, expected: Summary) -> None:
    assert found.objectives == expected.objectives
    for name in ("weights", "norms", "cosines", "update_cosines"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        if isinstance(theirs, Spread):
            ours, theirs = ours.quantiles, theirs.quantiles
        np.testing.assert_allclose(ours, theirs, atol=2e-6 if name == "cosines" else 1e-9)
    assert found.conflict_rate == expected.conflict_rate
    assert found.update_conflict_rate == expected.update_conflict_rate
    for name in ("imbalance", "mean_norm", "update_norm", "update_mean_cosine"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9)


def _layers(rank: int, world_size: int, folder: str) -> list[Any]:
    found = []
    for sharded in (False, True):
        for objective, batch_dim in ((LOSSES["instance"], 0), (_task_losses, None)):
            x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())
            model = make_network()
            wrapped = shard(model, mesh=make_mesh()) if sharded else wrap(model)
            engine = Engine(wrapped, batch_dim=batch_dim)
            home = Path(folder) / f"{sharded}-{batch_dim}"
            recorder = Recorder(home, every=3, per_layer_every=2)
            recorder.watch(engine)
            for _ in range(STEPS):
                losses = objective(wrapped(x), y)
                count = len(x) if batch_dim is None else None
                weights = engine.backward(losses, UPGradWeighting(), count=count)
            found.append(weights)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_layers_on_several_ranks(world_size: int, tmp_path: Path) -> None:
    run_ranks(_layers, world_size, str(tmp_path))
    model, (x, y) = make_network(), make_data()
    for sharded in (False, True):
        for objective, batch_dim in ((LOSSES["instance"], 0), (_task_losses, None)):
            records = Run.read(tmp_path / f"{sharded}-{batch_dim}").records
            assert [(r.step, len(r.layers)) for r in records] == [(0, 4), (2, 4)]
            losses = objective(model(x), y)
            everything = jacobian(losses, model.parameters())
            weights = UPGradWeighting()(everything @ everything.T).numpy()
            assert [layer.conflict_rate > 0 for layer in records[-1].layers][:2] == [True, True]
            for layer in records[-1].layers:
                rows = jacobian(losses, model.get_submodule(layer.name).parameters())
                statistics = statistics_of((rows @ rows.T).numpy(), weights)
                _check(layer, Summary.of("", statistics, each=batch_dim is None))


def _awkward(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())

    def trained(recorder: Recorder | None, nonfinite: bool = False) -> Tensor:
        ddp = wrap(make_network())
        engine = Engine(ddp, batch_dim=0, nonfinite="skip")
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
        weighting = UPGradWeighting(projector=QuadprogProjector(norm_eps=1e9))
        if recorder is not None:
            recorder.watch(engine)
        for step in range(STEPS):
            losses = LOSSES["instance"](ddp(x), y)
            if nonfinite and step == 1 and rank == world_size - 1:
                losses = losses * torch.nan
            optimizer.zero_grad()
            engine.backward(losses, weighting)
            optimizer.step()
        return parameters_of(ddp)

    def full(record: Record) -> None:
        raise OSError("No space left on device")

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        alone = trained(None)
        told = len(seen)
        failing = trained(Recorder(None, sinks=[full], every=1))
        warned = [str(w.message) for w in seen[told:] if "No space left" in str(w.message)]
        skipping = trained(None, nonfinite=True)
        recorder = Recorder(Path(folder) / "skips", every=2)
        assert torch.equal(trained(recorder, nonfinite=True), skipping)
        recorder.close()
    assert torch.equal(alone, failing)
    # Where warnings are errors, as in this suite, rank 0 must not raise alone.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="The Gramian's trace")
        assert torch.equal(trained(Recorder(None, sinks=[full], every=1)), alone)
        # Of another rank than 0, what it knows is written: times are those of waiting.
        trained(Recorder(Path(folder) / "last", every=1, rank=world_size - 1))
    # A recorder that is not the same on all ranks.
    ddp = wrap(make_network())
    engine = Engine(ddp, batch_dim=0)
    Recorder(None, per_layer_every=1 if rank else None).watch(engine)
    with pytest.raises(LayoutMismatchError, match="Gramians by layer"):
        engine.backward(LOSSES["instance"](ddp(x), y), UPGradWeighting())
    return {"warned": warned}


@pytest.mark.parametrize("world_size", [2, 4])
def test_what_fails_while_recording_does_not_end_training(world_size: int, tmp_path: Path) -> None:
    results = run_ranks(_awkward, world_size, str(tmp_path))
    assert [len(result["warned"]) for result in results] == [1] + [0] * (world_size - 1)
    skips = Run.read(tmp_path / "skips")
    assert skips.counts == {"steps": STEPS, "skipped": 1, "below_norm_eps": STEPS - 1}
    assert [record.step for record in skips.records] == [0, 2]
    last = Run.read(tmp_path / "last")
    assert [record.groups[0].objectives for record in last.records] == [SAMPLES] * STEPS
