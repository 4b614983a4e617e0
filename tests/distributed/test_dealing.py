"""UPGrad's projections dealt out over ranks: the same weights, and no rank left behind."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jddist.aggregation import CRMOGMWeighting, DualProjWeighting, UPGradWeighting
from jddist.autogram import Engine
from jddist.distribution.collectives import Group
from jddist.distribution.once import Job, run_on_rank_zero
from jddist.errors import LayoutMismatchError, RankError
from jddist.linalg import AutomaticProjector, BatchedProjector, QuadprogProjector
from jddist.linalg._dealing import is_dealt
from tests._ranks import run_ranks
from tests.distributed._training import local_part, make_network, wrap
from tests.unit.linalg._gramians import make_gramian

M = 30
KINDS = ["conflicting", "low rank", "zero", "common part"]


def weighting(deal_from: int | None) -> UPGradWeighting:
    return UPGradWeighting(projector=BatchedProjector(norm_eps=0, deal_from=deal_from))


def _dealt_weights(rank: int, world_size: int) -> list[tuple[Tensor, int]]:
    group = Group(dist.group.WORLD)
    found = []
    for kind in KINDS:
        mine = weighting(deal_from=2)
        solved: list[int] = []
        solve = mine.projector._solve_here
        mine.projector._solve_here = lambda u, g, s=solve, n=solved: n.append(len(u)) or s(u, g)
        gramian = make_gramian(kind, M)
        for _ in range(2):  # the second call starts from the first one's share
            (weights,) = run_on_rank_zero(group, [Job(mine, gramian, torch.Size([M]))])
        found.append((weights, solved[0]))
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_same_weights_from_shares(world_size: int) -> None:
    results = run_ranks(_dealt_weights, world_size)
    for i, kind in enumerate(KINDS):
        expected = weighting(None)(make_gramian(kind, M))
        shares = [result[i][1] for result in results]
        assert sum(shares) == M and max(shares) - min(shares) <= 1
        for result in results:
            weights = result[i][0]
            # Sums of m solutions of problems of condition 1e4 m.
            assert float((weights - expected).abs().max()) <= 1e-11 * float(expected.max())
            assert torch.equal(weights, results[0][i][0])


def test_who_deals() -> None:
    assert is_dealt(weighting(20), 20) and not is_dealt(weighting(20), 19)
    assert is_dealt(CRMOGMWeighting(weighting(20)), 20)
    assert is_dealt(UPGradWeighting(), 1024) and not is_dealt(UPGradWeighting(), 1023)
    assert not is_dealt(weighting(None), 5000)
    assert not is_dealt(DualProjWeighting(), 5000)  # one problem
    assert not is_dealt(lambda gramian: gramian.diagonal(), 5000)


class Failing(UPGradWeighting):
    """Raises on one rank, before or after the projections."""

    def __init__(self, rank: int, bad_rank: int, before: bool) -> None:
        super().__init__(projector=BatchedProjector(deal_from=2))
        self.fails, self.before = rank == bad_rank, before

    def forward(self, gramian: Tensor, /) -> Tensor:
        if self.fails and self.before:
            raise KeyError("before")
        weights = super().forward(gramian)
        if self.fails:
            raise KeyError("after")
        return weights


def _failures(rank: int, world_size: int) -> list[str]:
    group, seen = Group(dist.group.WORLD), []
    gramian = make_gramian("conflicting", M)
    shape = torch.Size([M])
    jobs = [Failing(rank, bad, before) for bad in (0, 1) for before in (True, False)]
    for job in jobs:
        with pytest.raises(RankError) as caught:
            run_on_rank_zero(group, [Job(job, gramian, shape)])
        seen.append(str(caught.value))
    twice = nn.Sequential(weighting(2)) if rank == 0 else weighting(2)
    if rank == 0:  # solves twice as many problems as the others

        def again(module: nn.Module, args: tuple[Tensor], result: Tensor) -> None:
            if not getattr(module, "busy", False):
                module.busy = True  # type: ignore[assignment]
                module(*args)

        twice[0].register_forward_hook(again)
    with pytest.raises(LayoutMismatchError) as mismatch:
        run_on_rank_zero(group, [Job(twice, gramian, shape)])
    seen.append(str(mismatch.value))
    # The group still works.
    (weights,) = run_on_rank_zero(group, [Job(weighting(2), gramian, shape)])
    assert torch.isfinite(weights).all()
    return seen


def test_a_failure_on_one_rank_ends_all() -> None:
    results = run_ranks(_failures, 3)
    assert results[0] == results[1] == results[2]
    for text, (bad, word) in zip(
        results[0], [(0, "before"), (0, "after"), (1, "before"), (1, "after")], strict=False
    ):
        assert f"rank {bad}" in text and word in text
    assert "same weighting" in results[0][-1]


def _mixed(rank: int, world_size: int) -> list[str | Tensor]:
    group, gramian = Group(dist.group.WORLD), make_gramian("conflicting", M)
    quadprog = UPGradWeighting(projector=QuadprogProjector(norm_eps=0))
    preferring = UPGradWeighting(torch.ones(M) * (1 + rank), BatchedProjector(deal_from=2))
    regular = UPGradWeighting(projector=BatchedProjector(reg_eps=1e-3 / (1 + rank), deal_from=2))
    automatic = UPGradWeighting(projector=AutomaticProjector(reg_eps=1e-3 / (1 + rank)))
    automatic.projector._batched.deal_from = 2
    found: list[str | Tensor] = []
    for mine in (
        quadprog if rank == 0 else weighting(2),
        weighting(2) if rank == 0 else quadprog,
        weighting(2) if rank == 0 else torch.diagonal,
        weighting(2 + rank * M),
        preferring,
        regular,
        automatic,
    ):
        large = mine is automatic  # beyond what it gives to quadprog
        matrix = make_gramian("conflicting", 2 * M) if large else gramian
        try:
            (weights,) = run_on_rank_zero(group, [Job(mine, matrix, matrix.shape[:1])])
            found.append(weights)
        except LayoutMismatchError as error:
            found.append(str(error))
    return found


def test_ranks_with_other_weightings_follow_or_fail_together() -> None:
    results = run_ranks(_mixed, 2, timeout=20.0)
    # Where rank 0 does not deal, what the others have does not matter.
    expected = weighting(None)(make_gramian("conflicting", M))
    for followed, *refused in results:
        assert float((followed - expected).abs().max()) <= 1e-11 * float(expected.max())
        assert all("different problems" in text for text in refused), refused


def _engine_steps(rank: int, world_size: int, deal_from: int | None) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(M, 5, dtype=torch.float64)
    model = wrap(make_network())
    engine = Engine(model, batch_dim=0)
    mine = weighting(deal_from)
    for _ in range(2):
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = model(local_part(x, rank, world_size, "uneven")).square().sum(1)
        weights = engine.backward(losses, mine)
    gradients = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    return weights, gradients


def test_steps_of_an_engine() -> None:
    dealt = run_ranks(_engine_steps, 3, 2)
    alone = run_ranks(_engine_steps, 3, None)
    for (weights, gradients), (expected, expected_gradients) in zip(dealt, alone, strict=True):
        assert float((weights - expected).norm()) <= 1e-11 * float(expected.norm())
        error = float((gradients - expected_gradients).norm())
        assert error <= 1e-10 * float(expected_gradients.norm())
