"""The weightings of many groups are shared out over the ranks, where any of them may run any."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Partial

from jddist import attach
from jddist.aggregation import (
    MGDA,
    GradVac,
    GramianWeightedAggregator,
    Krum,
    PCGrad,
    UPGrad,
    UPGradWeighting,
)
from jddist.autojac import backward, jac_to_grad_groups
from jddist.distribution.shared_out import fingerprint
from jddist.errors import RankError
from jddist.grouping import per_tensor
from jddist.linalg import QuadprogProjector
from tests._oracle import relative_error
from tests._ranks import run_ranks
from tests.distributed._sharded import make_mesh, rows_of, shard, whole_gradients
from tests.distributed._spy import spying
from tests.distributed._training import LOSSES, TASKS, local_part, make_data, make_network

BOUND = 1e-10
GROUPS = len(list(make_network().parameters()))


class _Own(UPGradWeighting):
    """A user's own, of which nobody knows what it does."""


class _Fails(UPGradWeighting):
    pure = True

    def forward(self, stat: Tensor, /) -> Tensor:
        raise ValueError("no weights today")


def _aggregators(case: str, rank: int) -> list[Any]:
    numbers = range(GROUPS)
    if case == "some stateful":
        kinds = (GradVac, PCGrad, UPGrad)
        return [kinds[i % 3]() for i in numbers]
    if case == "other settings":
        projector = QuadprogProjector(reg_eps=1e-4 * (1 + rank))
        return [UPGrad(projector=projector) for _ in numbers]
    if case == "a user's own":
        return [GramianWeightedAggregator(_Own()) for _ in numbers]
    if case == "fails":
        return [GramianWeightedAggregator(_Fails()) if i == 1 else UPGrad() for i in numbers]
    return [UPGrad() if i % 2 else MGDA() for i in numbers]


def _note(calls: list[int], index: int, *_: object) -> None:
    calls.append(index)


def _on_ranks(rank: int, world_size: int) -> dict[str, Any]:
    model = make_network()
    shard(model, mesh=make_mesh(), reshard=True)
    attach(model, objectives=Partial("avg"))
    x, y = (local_part(t[:6], rank, world_size, "even") for t in make_data())
    found: dict[str, Any] = {}
    for case in ("pure", "some stateful", "other settings", "a user's own", "fails", "hooked"):
        aggregators = _aggregators(case, rank)
        calls: list[int] = []
        for i, aggregator in enumerate(aggregators):
            if case == "hooked":
                hook = partial(_note, calls, i)
                aggregator.gramian_weighting.register_forward_hook(hook)
        backward(list(LOSSES["task"](model(x), y)))
        torch.manual_seed(3)
        with spying(rank, world_size) as log:
            try:
                weights = jac_to_grad_groups(per_tensor(model), aggregators)
            except RankError as error:
                found[case] = {"error": str(error)}
                continue
        found[case] = {
            "weights": weights,
            "gradient": whole_gradients(model),
            "broadcasts": sum(name == "broadcast" for name, _ in log),
            "sums": sum(name == "all_reduce" for name, _ in log),
            "hooks": len(calls),
        }
        model.zero_grad()
    return found


def _reference(case: str) -> list[Tensor]:
    model, (x, y) = make_network(), make_data()
    rows = rows_of(LOSSES["task"](model(x[:6]), y[:6]), model)
    parts = rows.split([p.numel() for p in model.parameters()], dim=1)
    torch.manual_seed(3)
    aggregators = _aggregators(case, rank=0)
    return [a.gramian_weighting(g @ g.T) for a, g in zip(aggregators, parts, strict=True)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_groups_get_the_weights_of_one_process(world_size: int) -> None:
    ranks = run_ranks(_on_ranks, world_size)
    for found in ranks:
        for case in ("pure", "some stateful", "other settings", "a user's own", "hooked"):
            expected = _reference(case)
            for i, (got, want) in enumerate(zip(found[case]["weights"], expected, strict=True)):
                assert relative_error(got, want) <= BOUND, (case, i)
                assert torch.equal(got, ranks[0][case]["weights"][i]), (case, i)
            assert torch.equal(found[case]["gradient"], ranks[0][case]["gradient"]), case
        # All Gramians in one sum, and all weights in one; or a broadcast from rank 0.
        messages = {case: [f["sums"], f["broadcasts"]] for case, f in found.items() if "sums" in f}
        assert messages["pure"] == [2, 0]
        assert messages["other settings"] == messages["a user's own"] == [1, 1]
        assert messages["hooked"] == [1, 1]
        assert messages["some stateful"][0] == 2 and messages["some stateful"][1] >= 1
        assert found["fails"] == ranks[0]["fails"]
        assert f"on rank {1 % world_size}: ValueError: no weights today" in found["fails"]["error"]
    # Hooks run where they always did.
    assert [found["hooked"]["hooks"] for found in ranks] == [GROUPS] + [0] * (world_size - 1)


def test_what_is_shared_out() -> None:
    assert fingerprint(UPGradWeighting()) == fingerprint(UPGradWeighting()) is not None
    preference = torch.arange(1.0, TASKS + 1)
    assert fingerprint(UPGradWeighting(preference)) not in (None, fingerprint(UPGradWeighting()))
    other = UPGradWeighting(projector=QuadprogProjector(reg_eps=1e-3))
    assert fingerprint(other) != fingerprint(UPGradWeighting(projector=QuadprogProjector()))
    assert fingerprint(_Own()) is None  # a subclass may draw, or remember
    assert fingerprint(torch.nn.Identity()) is None
    assert fingerprint(GradVac().gramian_weighting) is None
    assert fingerprint(PCGrad().gramian_weighting) is None
    assert fingerprint(Krum(0, 1).gramian_weighting) != fingerprint(Krum(0, 2).gramian_weighting)
    hooked = UPGradWeighting()
    hooked.register_forward_hook(lambda *_: None)
    assert fingerprint(hooked) is None
