"""A rank that raises, hangs, dies or leaves at a stage: every other rank says which, and where."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from jddist._progress import progress
from jddist.aggregation import UPGradWeighting
from jddist.autogram import Engine
from tests.distributed._sharded import make_mesh, make_tied, shard
from tests.distributed._training import LOSSES, local_part, make_data, make_network, wrap
from tests.faults._survivors import PATIENCE, Outcome, fault, run_to_the_end

TIMEOUT = 5.0 * PATIENCE
STEP = 2
STAGES = ("forward", "handshake", "exchange", "weighting", "broadcast", "backward")
WORLD = 3


def _losses(model: torch.nn.Module, rank: int, world_size: int) -> Tensor:
    x, y = (local_part(t, rank, world_size, "even") for t in make_data())
    return LOSSES["instance"](model(x), y)


def _train(
    rank: int,
    world_size: int,
    kind: str,
    stage: str,
    culprit: int,
    form: str,
    pause: float = 0.0,
) -> None:
    """Steps, of which one goes wrong on one rank as soon as it has entered the stage."""
    if form == "fully_shard":
        model = make_tied()
        shard(model, [model.first, model.narrow], mesh=make_mesh())
    else:
        # With views of its buckets, DDP's own reducer does the last stage.
        model = wrap(make_network(), gradient_as_bucket_view=form != "book-keeping")
    engine = Engine(model, batch_dim=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tell = progress.listener
    assert tell is not None

    def listener() -> None:
        tell()
        if rank == culprit and (progress.step, progress.stage) == (STEP, stage):
            fault(kind)

    progress.listener = listener
    for _ in range(STEP + 3):
        time.sleep(pause)
        optimizer.zero_grad()
        losses = _losses(model, rank, world_size)
        if form == "bare":
            gramian = engine.compute_gramian(losses)
            weights = engine.compute_weights(gramian, UPGradWeighting())
            losses.backward(engine.local_weights(weights))
        else:
            engine.backward(losses, UPGradWeighting())
        optimizer.step()


def _check(outcomes: list[Outcome], kind: str, stage: str, form: str) -> None:
    culprit = _culprit(stage)
    # Collectives of the wrapper's, in code of the user's: torch's error, and ours in the log.
    bare = form in ("bare", "fully_shard")
    words = {
        "dies": "dead",
        "hangs": "stopped",
        "raises": "ended by ValueError: boom",
        "leaves": "dead",  # the harness leaves without Python's own end
    }
    for rank, outcome in enumerate(outcomes):
        if rank == culprit:
            assert outcome.kind == {"raises": "ValueError", "leaves": "SystemExit"}.get(
                kind, "killed"
            )
            continue
        told = outcome.message
        if bare and outcome.kind == "RuntimeError":
            told = outcome.log
        else:
            assert outcome.kind == "StalledRankError", outcome
        assert f"rank {culprit} {words[kind]}" in told, outcome
        assert f"in step {STEP}, {stage}" in told, outcome
        limit = TIMEOUT + 4 * PATIENCE if kind == "hangs" else 6 * PATIENCE
        assert outcome.seconds < limit, outcome


def _culprit(stage: str) -> int:
    return 0 if stage == "weighting" else 1  # only rank 0 weighs


DEFAULT = [
    ("dies", "forward", "book-keeping"),
    ("dies", "exchange", "book-keeping"),
    ("dies", "weighting", "reducer"),
    ("hangs", "handshake", "book-keeping"),
    ("hangs", "backward", "bare"),
    ("hangs", "backward", "reducer"),
    ("raises", "forward", "fully_shard"),
    ("raises", "broadcast", "book-keeping"),
]
ALL = [
    (kind, stage, form)
    for kind in ("dies", "hangs", "raises", "leaves")
    for stage in STAGES
    for form in ("book-keeping", "reducer", "bare", "fully_shard")
]


def _run(case: tuple[str, str, str]) -> list[Outcome]:
    kind, stage, form = case
    return run_to_the_end(_train, WORLD, kind, stage, _culprit(stage), form, timeout=TIMEOUT)


def _run_all(cases: list[tuple[str, str, str]]) -> None:
    wrong = []
    # Most of the time they wait.
    with ThreadPoolExecutor(2) as pool:
        for case, outcomes in zip(cases, pool.map(_run, cases), strict=True):
            try:
                _check(outcomes, *case)
            except AssertionError as error:
                wrong.append(f"{case}: {error}")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(cases)} cases:", *wrong])


def test_every_survivor_names_the_rank_and_its_stage() -> None:
    _run_all(DEFAULT)


@pytest.mark.parametrize("kind", ["dies", "hangs"])
def test_the_rank_that_holds_the_store(kind: str) -> None:
    """It takes all reports with it; what was last read of its own is left."""
    arguments = (kind, "exchange", 0, "book-keeping", 0.4)
    outcomes = run_to_the_end(_train, WORLD, *arguments, timeout=TIMEOUT, store="tcp")
    assert outcomes[0].kind == "killed"
    for outcome in outcomes[1:]:
        assert outcome.kind == "StalledRankError", outcome
        word = {"dies": "dead", "hangs": "stopped"}[kind]
        assert f"rank 0 {word}" in outcome.message, outcome
        assert "last seen in step " in outcome.message, outcome


def test_a_rank_that_lives_and_lags() -> None:
    """It sleeps in its forward; the others say so in their logs before they give up."""
    outcomes = run_to_the_end(
        _train, WORLD, "sleeps", "forward", 1, "book-keeping", timeout=TIMEOUT
    )
    for rank in (0, 2):
        outcome = outcomes[rank]
        assert outcome.kind == "StalledRankError", outcome
        assert f"rank 1 still in step {STEP}, forward, for " in outcome.message, outcome
        waited = rf"rank {rank} has been in step {STEP}, handshake, for \d+ s"
        assert re.search(waited, outcome.log), outcome
        assert f"Found rank 1 still in step {STEP}, forward" in outcome.log, outcome


@pytest.mark.slow
def test_every_survivor_names_the_rank_and_its_stage_in_all_cases() -> None:
    _run_all(ALL)
