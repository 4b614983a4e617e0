"""What goes wrong on one rank ends the call on every rank, with the same named error.

Every scenario runs in one set of processes, one after the other, and ends with an ordinary step:
so a failure leaves neither a pending collective nor a touched ``.grad`` behind. That the whole
takes less than the process group's timeout shows that no rank waited for another.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jddist import attach
from jddist.aggregation import GradNormWeighting, UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autojac import backward, jac_to_grad, mtl_backward
from jddist.distribution import Local
from jddist.errors import (
    LayoutMismatchError,
    NonFiniteObjectiveError,
    RankError,
    UnattachedParameterError,
    UnsupportedModelError,
)
from tests._ranks import run_ranks
from tests.distributed._training import LOSSES, local_part, make_data, make_network, wrap

TIMEOUT = 60.0
CULPRIT = 1

Scenario = Callable[[Engine, DistributedDataParallel, Tensor, bool], object]


def _losses(ddp: DistributedDataParallel, x: Tensor) -> Tensor:
    return LOSSES["instance"](ddp(x), torch.zeros(len(x), 4, dtype=x.dtype))


def _nan_loss(engine: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool) -> object:
    losses = _losses(ddp, x)
    return engine.backward(losses * float("nan") if culprit else losses, UPGradWeighting())


def _infinite_row(engine: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool) -> object:
    # A finite loss (0) whose gradient is infinite.
    losses = _losses(ddp, x)
    losses = (losses - losses.detach()).sqrt() if culprit else losses
    return engine.backward(losses, UPGradWeighting())


def _other_dtype(engine: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool) -> object:
    losses = _losses(ddp, x)
    return engine.backward(losses.float() if culprit else losses, UPGradWeighting())


def _other_shape(engine: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool) -> object:
    losses = ddp(x).pow(2)
    return engine.compute_gramian(losses if culprit else losses[:, :3])


def _other_batch_dim(_: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool) -> object:
    engine = Engine(ddp, batch_dim=1 if culprit else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dimension 1 counts no samples: slow, it says
        return engine.compute_gramian(ddp(x).pow(2))


def _other_parameters(
    engine: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool
) -> object:
    losses = _losses(ddp, x)
    ddp.module.last.bias.requires_grad_(not culprit)
    try:
        return engine.compute_gramian(losses)
    finally:
        ddp.module.last.bias.requires_grad_(True)


def _other_call(engine: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool) -> object:
    losses = _losses(ddp, x)
    if culprit:
        return engine.compute_gramian(losses)
    return engine.backward(losses, torch.ones(9, dtype=x.dtype))


def _other_weights(
    engine: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool
) -> object:
    return engine.backward(_losses(ddp, x), torch.ones(8 if culprit else 9, dtype=x.dtype))


def _other_losses(engine: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool) -> object:
    losses, weighting = ddp(x).pow(2).mean(0), GradNormWeighting()
    weighting.set_losses(torch.full((4,), 2.0 if culprit else 1.0))
    return Engine(ddp, batch_dim=None).backward(losses, weighting)


def _no_graph(engine: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool) -> object:
    losses = _losses(ddp, x)
    return engine.compute_gramian(losses.detach() if culprit else losses)


def _modified_input(
    engine: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool
) -> object:
    x = x.clone()
    losses = _losses(ddp, x)
    if culprit:
        x.add_(1)
    return engine.compute_gramian(losses)


def _failing_weighting(
    engine: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool
) -> object:
    def weighting(gramian: Tensor) -> Tensor:
        raise KeyError("no such task")

    return engine.backward(_losses(ddp, x), weighting)


def _nan_task(engine: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool) -> object:
    features = ddp(x)
    losses = [features[:, task].pow(2).mean() for task in range(4)]
    if culprit:
        losses[2] = losses[2] * float("inf")
    mtl_backward(losses, features=features)
    return jac_to_grad([p for p in ddp.parameters() if hasattr(p, "jac")], UPGrad())


def _other_number_of_tasks(
    engine: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool
) -> object:
    features = ddp(x)
    losses = [features[:, task].pow(2).mean() for task in range(3 if culprit else 4)]
    return mtl_backward(losses, features=features)


def _bad_argument(engine: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool) -> object:
    features = ddp(x)
    losses = [features[:, task].pow(2).mean() for task in range(4)]
    return mtl_backward(losses, features=[] if culprit else features)


def _missing_jac(engine: Engine, ddp: DistributedDataParallel, x: Tensor, culprit: bool) -> object:
    return jac_to_grad(ddp.parameters(), UPGrad())


SCENARIOS: dict[str, tuple[Scenario, type[Exception], str]] = {
    "nan loss": (_nan_loss, NonFiniteObjectiveError, "rank 1"),
    "infinite row": (_infinite_row, NonFiniteObjectiveError, "rank 1"),
    "other dtype": (_other_dtype, LayoutMismatchError, "float32"),
    "other shape": (_other_shape, LayoutMismatchError, "[*, 3]"),
    "other batch_dim": (_other_batch_dim, LayoutMismatchError, "batch_dim"),
    "other parameters": (_other_parameters, LayoutMismatchError, "trainable parameters"),
    "other call": (_other_call, LayoutMismatchError, "Engine.backward"),
    "other weights": (_other_weights, LayoutMismatchError, "shape of the weights"),
    "other losses": (_other_losses, LayoutMismatchError, "losses stated to the weighting"),
    "no graph": (_no_graph, RankError, "rank 1 raised ValueError"),
    "modified input": (_modified_input, RankError, "first"),
    "failing weighting": (_failing_weighting, RankError, "no such task"),
    "nan task": (_nan_task, NonFiniteObjectiveError, "rank 1"),
    "other number of tasks": (_other_number_of_tasks, LayoutMismatchError, "tasks"),
    "bad argument": (_bad_argument, RankError, "rank 1 raised ValueError"),
    "missing jac": (_missing_jac, ValueError, "first.weight"),
}


def _run_scenarios(rank: int, world_size: int) -> dict[str, dict[str, object]]:
    ddp = wrap(make_network())
    engine = Engine(ddp, batch_dim=0)
    (x, _) = (local_part(t, rank, world_size, "uneven") for t in make_data())
    results: dict[str, dict[str, object]] = {}
    for name, (scenario, expected, _) in SCENARIOS.items():
        for p in ddp.parameters():
            p.grad = torch.full_like(p, 7.0)
            p.__dict__.pop("jac", None)
        start = time.monotonic()
        try:
            scenario(engine, ddp, x, rank == CULPRIT)
            kind, message = "no error", ""
        except Exception as error:  # compared below
            kind = type(error).__name__ if type(error) is not expected else expected.__name__
            message = str(error)
        untouched = all(bool((p.grad == 7.0).all()) for p in ddp.parameters())
        seconds = time.monotonic() - start
        results[name] = {
            "kind": kind,
            "message": message,
            "untouched": untouched,
            "seconds": seconds,
        }
    for p in ddp.parameters():
        p.grad = None
        p.__dict__.pop("jac", None)
    weights = engine.backward(_losses(ddp, x), UPGradWeighting())
    results["afterwards"] = {"weights": weights.tolist()}
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_failure_on_one_rank_is_the_same_error_on_every_rank(world_size: int) -> None:
    ranks = run_ranks(_run_scenarios, world_size, timeout=TIMEOUT)
    for name, (_, expected, part) in SCENARIOS.items():
        for result in ranks:
            found = result[name]
            assert found["kind"] == expected.__name__, (name, found)
            assert part in found["message"], (name, found)
            if expected is NonFiniteObjectiveError:  # it blames the culprit alone
                assert "rank 0" not in found["message"], (name, found)
            assert found["message"] == ranks[0][name]["message"], name
            assert found["untouched"], name
            assert found["seconds"] < TIMEOUT / 2, name
    assert all(r["afterwards"] == ranks[0]["afterwards"] for r in ranks)


def _refusals(rank: int, world_size: int) -> dict[str, str]:
    plain = make_network()
    found = {}

    def note(name: str, call: Callable[[], object], expected: type[Exception]) -> None:
        with pytest.raises(expected) as caught:
            call()
        found[name] = str(caught.value)

    x, y = make_data()
    features = plain(x)
    losses = [features[:, i].mean() for i in range(4)]
    unattached = UnattachedParameterError
    note("engine", lambda: Engine(plain, batch_dim=0), unattached)
    note("attach", lambda: attach(plain), unattached)
    note("weighting", lambda: attach(plain, weighting=UPGradWeighting()), ValueError)
    note("mtl", lambda: mtl_backward(losses, features=features), unattached)
    for p in plain.parameters():
        p.jac = torch.ones(4, *p.shape, dtype=p.dtype)
    note("jac_to_grad", lambda: jac_to_grad(plain.parameters(), UPGrad()), unattached)
    Engine(plain, batch_dim=0, distribution=Local())  # said explicitly: fine
    jac_to_grad(plain.parameters(), UPGrad(), distribution=Local())
    ddp = wrap(make_network())
    attach(ddp)
    note("no objectives", lambda: backward(LOSSES["instance"](ddp(x), y)), ValueError)
    norm = wrap(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double())
    note("batch norm", lambda: Engine(norm, batch_dim=None), UnsupportedModelError)
    Engine(norm.eval(), batch_dim=None)
    mixed = nn.ModuleList([ddp, nn.Linear(4, 1).double()])
    note("half wrapped", lambda: Engine(mixed, batch_dim=0), UnsupportedModelError)
    return found


def test_what_cannot_be_exact_is_refused_with_the_fix() -> None:
    for found in run_ranks(_refusals, 2):
        for name in ("engine", "mtl", "jac_to_grad"):
            assert "jddist.attach" in found[name] and "Local()" in found[name]
        assert "DistributedDataParallel" in found["attach"]
        assert "Shard(0)" in found["no objectives"]
        assert "Engine.backward" in found["weighting"]
        assert "GroupNorm" in found["batch norm"]
        assert "1.weight" in found["half wrapped"]


def _skip(rank: int, world_size: int) -> dict[str, object]:
    ddp = wrap(make_network())
    engine = Engine(ddp, batch_dim=0, nonfinite="skip")
    x, _ = (local_part(t, rank, world_size, "even") for t in make_data())
    with pytest.warns(UserWarning, match="objective 5 .*weights of this step are zero"):
        losses = _losses(ddp, x)
        if rank == CULPRIT:
            losses = torch.cat([losses[:0], losses[:1] * float("nan"), losses[1:]])
        weights = engine.backward(losses, UPGradWeighting())
    skipped = all(p.grad is None for p in ddp.parameters())
    again = engine.backward(_losses(ddp, x), UPGradWeighting())
    return {"zero": bool((weights == 0).all()), "skipped": skipped, "again": bool(again.any())}


def test_skipping_a_nonfinite_step_returns_zero_weights() -> None:
    for found in run_ranks(_skip, 2):
        assert found == {"zero": True, "skipped": True, "again": True}
