"""What is recorded of the steps of engines and aggregators, in one process."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jddist import attach, grouping
from jddist.aggregation import (
    ConFIG,
    Flattening,
    GradDrop,
    Mean,
    MoDoWeighting,
    UPGrad,
    UPGradWeighting,
)
from jddist.autogram import Engine
from jddist.autojac import backward, jac_to_grad, jac_to_grad_groups, mtl_backward
from jddist.errors import NonFiniteObjectiveError
from jddist.linalg import BatchedProjector, QuadprogProjector
from jddist.monitoring import Record, Recorder, Run, Spread, Summary, statistics_of
from tests._oracle import jacobian

from ._runs import TASKS, batch, make_model, task_losses, train_on_samples, train_on_tasks


class _Kept(list):  # type: ignore[type-arg]
    """A sink that keeps the records."""

    def __call__(self, record: Record) -> None:
        self.append(record)

    __hash__ = object.__hash__  # type: ignore[assignment]


def _recorder(**options: object) -> tuple[Recorder, _Kept]:
    kept = _Kept()
    options = {"every": 1, **options}
    return Recorder(None, sinks=[kept], **options), kept  # type: ignore[arg-type]


def _expected(rows: Tensor, weights: Tensor) -> Summary:
    gramian = (rows @ rows.T).double().numpy()
    return Summary.of("", statistics_of(gramian, weights.double().numpy()), each=True)


def _same(found: Summary, expected: Summary, tolerance: float = 1e-9) -> None:
    assert found.objectives == expected.objectives
    for name in ("weights", "norms", "cosines", "update_cosines"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=tolerance)
    for name in ("conflict_rate", "imbalance", "mean_norm", "update_norm", "update_mean_cosine"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=tolerance)
    assert found.update_conflict_rate == expected.update_conflict_rate


def test_an_engines_steps_against_brute_force() -> None:
    recorder, kept = _recorder(names=["a", "b", "c", "d"])
    model = make_model()
    engine = Engine(model, batch_dim=None)
    recorder.watch(engine)
    for step in range(3):
        losses = task_losses(model, batch(step))
        rows = jacobian(losses, model.parameters())
        weights = engine.backward(losses, UPGradWeighting())
        _same(kept[-1].groups[0], _expected(rows, weights))
        assert kept[-1].step == step and not kept[-1].per_sample
        assert kept[-1].groups[0].weights.tolist() == weights.tolist()
        assert kept[-1].groups[0].conflict_rate > 0
        assert set(kept[-1].seconds) == {"gramian", "weighting", "gradient"} | (
            {"step"} if step else set()
        )
        assert kept[-1].counts == {"steps": 1}
        scalars = kept[-1].scalars()
        assert scalars["weights/b"] == float(weights[1])
        assert all(isinstance(value, float) for value in scalars.values())
    shares = kept[-1].shares()
    assert 0 < sum(shares.values()) <= 1 and set(shares) == {"gramian", "weighting", "gradient"}


def test_step_by_step_is_the_same() -> None:
    recorder, kept = _recorder()
    model = make_model()
    engine = Engine(model, batch_dim=None)
    recorder.watch(engine)
    losses = task_losses(model, batch(0))
    rows = jacobian(losses, model.parameters())
    weights = engine.compute_weights(engine.compute_gramian(losses), UPGradWeighting())
    losses.backward(engine.local_weights(weights))
    assert len(kept) == 1
    _same(kept[0].groups[0], _expected(rows, weights))


def test_samples_are_recorded_as_distributions() -> None:
    recorder, kept = _recorder()
    train_on_samples(recorder, 2)
    group = kept[-1].groups[0]
    assert kept[-1].per_sample and group.objectives == 8 and kept[-1].tasks is None
    for values in (group.weights, group.norms, group.cosines, group.update_cosines):
        assert isinstance(values, Spread)
    assert int(group.cosines.histogram.sum()) == 8 * 7 // 2


def test_samples_and_tasks() -> None:
    recorder, kept = _recorder(names=["a", "b", "c", "d"])
    model = make_model()
    engine = Engine(model, batch_dim=1)
    recorder.watch(engine)
    losses = model(batch(0, 5)).square().T  # [tasks, samples]
    rows = jacobian(losses, model.parameters()).view(TASKS, 5, -1)
    weights = engine.backward(losses, Flattening(UPGradWeighting()))
    update = torch.einsum("ij,ijp->p", weights, rows)
    means = rows.mean(dim=1)
    tasks = kept[0].tasks
    assert tasks is not None and kept[0].groups[0].objectives == 5 * TASKS
    np.testing.assert_allclose(tasks.weights, weights.sum(dim=1), rtol=1e-12)
    np.testing.assert_allclose(tasks.norms, means.norm(dim=1), rtol=1e-9)
    expected = torch.cosine_similarity(means, update.unsqueeze(0), dim=1)
    np.testing.assert_allclose(tasks.update_cosines, expected, atol=1e-9)
    assert "tasks/weights/c" in kept[0].scalars()


def test_layers_add_up_to_the_whole() -> None:
    recorder, kept = _recorder(per_layer_every=2)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, TASKS)).double()
    model.append(nn.Linear(TASKS, TASKS).double())
    model[3].weight = nn.Parameter(torch.eye(TASKS, dtype=torch.float64))
    model[3].bias.requires_grad_(False)
    tied = nn.Linear(5, 5).double()
    tied.weight = model[0].weight  # counted with the first
    model.insert(1, tied)
    engine = Engine(model, batch_dim=None)
    recorder.watch(engine)
    for step in range(3):
        model.zero_grad()
        losses = task_losses(model, batch(step))
        weights = engine.backward(losses, UPGradWeighting(), retain_graph=True)
        assert bool(kept[-1].layers) == (step % 2 == 0)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradient = torch.cat([p.grad.flatten() for p in trained])
        torch.testing.assert_close(gradient, weights @ jacobian(losses, trained))
    found = {layer.name: layer for layer in kept[-1].layers}
    assert list(found) == ["0", "1", "3", "4"]
    for name, parameters in (
        ("0", [model[0].weight, model[0].bias]),
        ("1", [tied.bias]),
        ("3", list(model[3].parameters())),
        ("4", [model[4].weight]),
    ):
        rows = jacobian(losses, parameters)
        _same(found[name], _expected(rows, weights))
    squares = sum(layer.norms**2 for layer in kept[-1].layers)
    np.testing.assert_allclose(squares, kept[-1].groups[0].norms ** 2, rtol=1e-9)


@pytest.mark.parametrize("by_gramian", [False, True])
@pytest.mark.parametrize("make", [UPGrad, ConFIG])
def test_aggregators_against_brute_force(make: type, by_gramian: bool) -> None:
    recorder, kept = _recorder()
    model, aggregator = make_model(), make()
    recorder.watch(aggregator)
    losses = task_losses(model, batch(0))
    rows = jacobian(losses, model.parameters())
    backward(losses)
    weights = jac_to_grad(model.parameters(), aggregator, optimize_gramian_computation=by_gramian)
    assert weights is not None
    _same(kept[0].groups[0], _expected(rows, weights))
    assert kept[0].seconds["weighting"] > 0


def test_an_aggregator_without_weights() -> None:
    recorder, kept = _recorder()
    model, aggregator = make_model(), GradDrop()
    recorder.watch(aggregator)
    losses = task_losses(model, batch(0))
    rows = jacobian(losses, model.parameters())
    backward(losses)
    jac_to_grad(model.parameters(), aggregator)
    update = torch.cat([p.grad.flatten() for p in model.parameters()])
    found = kept[0].groups[0]
    assert found.weights is None
    expected = torch.cosine_similarity(rows, update.unsqueeze(0), dim=1)
    np.testing.assert_allclose(found.update_cosines, expected, atol=1e-9)
    mean = torch.cosine_similarity(rows.mean(dim=0), update, dim=0)
    assert found.update_mean_cosine == pytest.approx(float(mean), abs=1e-9)


def test_an_aggregator_that_forms_no_gramian() -> None:
    recorder, kept = _recorder(every=2)
    model, aggregator = make_model(), Mean()
    recorder.watch(aggregator)
    for step in range(3):
        losses = task_losses(model, batch(step))
        rows = jacobian(losses, model.parameters())
        backward(losses)
        weights = jac_to_grad(model.parameters(), aggregator)
    assert [record.step for record in kept] == [0, 2]
    assert weights is not None
    _same(kept[-1].groups[0], _expected(rows, weights))
    assert kept[-1].groups[0].update_mean_cosine == pytest.approx(1.0)


def test_groups_are_recorded_one_by_one() -> None:
    recorder, kept = _recorder()
    model = make_model()
    attach(model)
    groups = grouping.per_layer(model)
    aggregators = [UPGrad() for _ in groups]
    recorder.watch(*aggregators)
    losses = task_losses(model, batch(0))
    rows = [jacobian(losses, group) for group in groups]
    backward(losses)
    weights = jac_to_grad_groups(groups, aggregators)
    assert len(kept) == 1 and [group.name for group in kept[0].groups] == ["0", "2"]
    for found, own, weight in zip(kept[0].groups, rows, weights, strict=True):
        assert weight is not None
        _same(found, _expected(own, weight))


@pytest.mark.parametrize("names", [None, ("first", "last")])
def test_names_of_groups(names: tuple[str, ...] | None) -> None:
    recorder, kept = _recorder(groups=names)
    model, shared = make_model(), UPGrad()  # one without state may serve both groups
    recorder.watch(shared)
    backward(task_losses(model, batch(0)))
    jac_to_grad_groups(grouping.per_layer(model), [shared, shared])
    expected = names or ("group 0", "group 1")  # nothing is attached: no names are known
    assert tuple(group.name for group in kept[0].groups) == expected


def test_mtl_backward_with_an_aggregator() -> None:
    recorder, kept = _recorder()
    model, aggregator = make_model(), UPGrad()
    recorder.watch(aggregator)
    features = model(batch(0))
    losses = [features[:, i].sub(i).square().mean() for i in range(TASKS)]
    rows = jacobian(torch.stack(losses), model.parameters())
    mtl_backward(losses, features=features)
    weights = jac_to_grad(model.parameters(), aggregator)
    assert weights is not None
    _same(kept[0].groups[0], _expected(rows, weights))


def test_a_weighting_that_the_user_calls() -> None:
    """The seeds' loop: Gramian, weighting, backward."""
    recorder, kept = _recorder()
    model, weighting = make_model(), UPGradWeighting()
    engine = Engine(model, batch_dim=None)
    watching = recorder.watch(weighting)
    losses = task_losses(model, batch(0))
    rows = jacobian(losses, model.parameters())
    gramian = engine.compute_gramian(losses)
    weights = weighting(gramian)
    _same(kept[0].groups[0], _expected(rows, weights))
    watching.end()
    weighting(gramian)
    assert len(kept) == 1


def test_accumulated_batches_are_one_step() -> None:
    recorder, kept = _recorder()
    model, weighting = make_model(), UPGradWeighting()
    engine = Engine(model, batch_dim=0)
    recorder.watch(engine)
    with engine.accumulate() as accumulation:
        for step in range(2):
            engine.backward(model(batch(step, 3)).square().sum(dim=1), weighting)
    assert len(kept) == 1 and kept[0].groups[0].objectives == 6
    assert accumulation.weights is not None


def test_weights_of_two_batches_count_with_the_step_that_takes_them() -> None:
    recorder, kept = _recorder()
    model = make_model()
    engine = Engine(model, batch_dim=None)
    recorder.watch(engine)
    first, second = (task_losses(model, batch(step)) for step in range(2))
    matrix = engine.cross_gramian(first, second)
    weights = engine.compute_weights(matrix, MoDoWeighting())
    assert not kept
    engine.backward(task_losses(model, batch(2)), weights)
    assert len(kept) == 1
    found = kept[0].groups[0]
    assert found.weights.tolist() == weights.tolist() and found.norms is None
    assert kept[0].seconds["weighting"] > 0


def test_steps_between_records_are_counted() -> None:
    recorder, kept = _recorder(every=4)
    train_on_tasks(recorder, 10)
    assert [record.step for record in kept] == [0, 4, 8]
    assert [record.counts["steps"] for record in kept] == [1, 4, 4]


def test_skipped_and_overflowed_steps_are_counted() -> None:
    recorder, kept = _recorder(every=3)
    model = make_model()
    engine = Engine(model, batch_dim=0, nonfinite="skip")
    recorder.watch(engine)
    for step in range(8):
        losses = model(batch(step, 4)).square().sum(dim=1)
        if step in (3, 4):  # the step that is due, and the next
            losses = losses * torch.tensor([1.0, torch.nan, 1.0, 1.0], dtype=torch.float64)
        scale = None
        if step == 6:
            losses, scale = losses * torch.inf, torch.inf
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.backward(losses, UPGradWeighting(), scale=scale)
    assert [record.step for record in kept] == [0, 5]
    assert kept[1].counts == {"steps": 5, "skipped": 2}
    recorder.close()
    assert recorder.step == 8


def test_a_step_that_raised_is_none() -> None:
    recorder, kept = _recorder()
    model = make_model()
    engine = Engine(model, batch_dim=0)
    recorder.watch(engine)
    with pytest.raises(NonFiniteObjectiveError):
        engine.backward(model(batch(0)).sum(dim=1) * torch.nan, UPGradWeighting())
    engine.backward(model(batch(1)).square().sum(dim=1), UPGradWeighting())
    assert [record.step for record in kept] == [0]


def test_the_projectors_counts() -> None:
    """Below norm_eps UPGrad is the mean; also for a new weighting in every step."""
    recorder, kept = _recorder(every=2)
    model = make_model()
    engine = Engine(model, batch_dim=None)
    recorder.watch(engine)
    old = UPGradWeighting(projector=QuadprogProjector(norm_eps=1e9))
    with pytest.warns(UserWarning, match="norm_eps"):
        old(torch.eye(TASKS))  # before: of no concern
    for step in range(4):
        new = UPGradWeighting(projector=QuadprogProjector(norm_eps=1e9 if step == 1 else 0.0))
        weighting = old if step == 2 else new
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.backward(task_losses(model, batch(step)), weighting)
    assert [record.counts for record in kept] == [
        {"steps": 1},
        {"steps": 2, "below_norm_eps": 2},
    ]


def test_fallbacks_to_quadprog_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jddist.linalg.batched_projector._CERTIFIED", -1.0)  # nothing is certified
    recorder, kept = _recorder()
    model = make_model()
    engine = Engine(model, batch_dim=None)
    recorder.watch(engine)
    projector = BatchedProjector()
    engine.backward(task_losses(model, batch(0)), UPGradWeighting(projector=projector))
    assert kept[0].counts["fallbacks"] == projector.fallbacks > 0


def test_a_run_goes_on(tmp_path: Path) -> None:
    """A second process counts on from the last step; after a checkpoint, from that."""
    recorder = Recorder(tmp_path, every=2)
    train_on_tasks(recorder, 5)
    state = recorder.state_dict()
    recorder.close()
    assert state == {"step": 5}
    second = Recorder(tmp_path, every=2)
    train_on_tasks(second, 4)  # killed: not closed
    assert [r.step for r in Run.read(tmp_path).records] == [0, 2, 4, 5, 7]
    third = Recorder(tmp_path, every=2)
    third.load_state_dict(state)
    train_on_tasks(third, 2)
    third.close()
    run = Run.read(tmp_path)
    assert [r.step for r in run.records] == [0, 2, 4, 5]
    assert [session.step for session in run.sessions] == [0, 5, 5]
    assert run.counts["steps"] == 7
    fourth = Recorder(tmp_path)
    train_on_tasks(fourth, 1)
    assert fourth.step == 8
    with pytest.raises(RuntimeError, match="expected a new one"):
        fourth.load_state_dict(state)


def test_a_sink_that_fails_is_said_once(tmp_path: Path) -> None:
    def broken(record: Record) -> None:
        raise OSError("No space left on device")

    kept = _Kept()
    recorder = Recorder(tmp_path, sinks=[broken, kept], every=1)
    with pytest.warns(RuntimeWarning, match="No space left on device") as seen:
        found = train_on_tasks(recorder, 3)
    assert len(seen) == 1
    assert len(kept) == 3 and len(Run.read(tmp_path).records) == 3
    alone = train_on_tasks(Recorder(None), 3)
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_a_warning_that_is_an_error_ends_up_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """On one rank alone, an exception would leave the others waiting."""
    recorder = Recorder(None, sinks=[lambda record: 1 / 0], every=1)
    with warnings.catch_warnings(), caplog.at_level(logging.ERROR, "jddist.monitoring"):
        warnings.simplefilter("error")
        train_on_tasks(recorder, 2)
    assert len(caplog.records) == 1 and "ZeroDivisionError" in caplog.text


def test_what_cannot_be_summed_up_does_not_end_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr("jddist.monitoring.summarize.statistics_of", fails)
    recorder, kept = _recorder()
    with pytest.warns(RuntimeWarning, match="recording raised MemoryError"):
        assert len(train_on_tasks(recorder, 2)) == 2
    assert not kept


def test_names_that_do_not_fit_are_said() -> None:
    recorder, kept = _recorder(names=["a", "b"])
    with pytest.warns(RuntimeWarning, match=r"Found 2 names for \[4\] objectives"):
        train_on_tasks(recorder, 2)
    assert "weights/3" in kept[0].scalars()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="Found every=0"):
        Recorder(None, every=0)
    with pytest.raises(ValueError, match="Found per_layer_every=-1"):
        Recorder(None, per_layer_every=-1)
    recorder = Recorder(None)
    with pytest.raises(ValueError, match="Found nothing to watch"):
        recorder.watch()
    with pytest.raises(ValueError, match="Found UPGradWeighting, UPGradWeighting to watch"):
        recorder.watch(UPGradWeighting(), UPGradWeighting())
    with recorder.watch(UPGrad()), pytest.raises(ValueError, match="watches something already"):
        recorder.watch(UPGrad())
    recorder.watch(UPGrad())  # the first watch has ended


def test_after_the_watch_nothing_is_recorded() -> None:
    recorder, kept = _recorder()
    model, aggregator = make_model(), UPGrad()
    engine = Engine(model, batch_dim=None)
    for target in (engine, aggregator):
        with recorder.watch(target):
            pass
    engine.backward(task_losses(model, batch(0)), UPGradWeighting())
    backward(task_losses(model, batch(0)))
    jac_to_grad(model.parameters(), aggregator)
    assert not kept and not engine.observers


def test_copies_are_not_watched() -> None:
    recorder, kept = _recorder()
    model, aggregator = make_model(), UPGrad()
    recorder.watch(aggregator)
    copied = copy.deepcopy(aggregator)
    backward(task_losses(model, batch(0)))
    jac_to_grad(model.parameters(), copied)
    assert not kept


def test_importing_jddist_needs_neither_matplotlib_nor_tensorboard() -> None:
    code = (
        "import sys, jddist, jddist.monitoring\n"
        "print([n for n in sys.modules if n.split('.')[0] in ('matplotlib', 'tensorboard')])\n"
        "print('jddist.monitoring' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["[]", "True"]


def test_records_are_json() -> None:
    recorder, kept = _recorder(per_layer_every=1)
    train_on_samples(recorder, 1)
    again = Record.from_json(json.loads(json.dumps(kept[0].as_json(), allow_nan=False)))
    assert again.as_json() == kept[0].as_json()
