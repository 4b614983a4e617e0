"""``count=`` of ``backward`` and ``jac``: rows of means over all samples, whatever the split.

Some tasks lack labels for some samples: counts differ between tasks and ranks, and where a rank has
none its loss is NaN. The bound 1e-10 is the project's for float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Shard

from jddist import attach
from jddist.aggregation import UPGrad
from jddist.autojac import backward, jac
from jddist.distribution import Local
from jddist.errors import LayoutMismatchError, RankError
from tests._oracle import jacobian, relative_error
from tests._ranks import run_ranks
from tests.distributed._sharded import make_mesh, shard, whole, whole_gradients
from tests.distributed._training import TASKS, local_part, make_data, make_network, wrap

BOUND = 1e-10


def _losses(outputs: Tensor, y: Tensor) -> tuple[Tensor, list[int]]:
    """The means [TASKS] over the labelled samples, NaN without any, and their numbers."""
    bounds = torch.tensor([9.0, 1.0, 0.5, 0.2], dtype=torch.float64)
    labelled = y < bounds
    errors = (outputs - y).pow(2)
    means = torch.stack([errors[labelled[:, t], t].mean() for t in range(TASKS)])
    return means, labelled.sum(dim=0).tolist()


def _expected() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    model, (x, y) = make_network(), make_data()
    rows = jacobian(_losses(model(x), y)[0], model.parameters())
    return rows, UPGrad().gramian_weighting(rows @ rows.T) @ rows


def _found(rank: int, world_size: int, kind: str, sharded: bool) -> dict[str, Tensor]:
    torch.manual_seed(2)
    model = make_network()
    wrapped = shard(model, mesh=make_mesh()) if sharded else wrap(model)
    attach(wrapped, objectives=Partial("avg"))
    x, y = (local_part(t, rank, world_size, kind) for t in make_data())
    losses, counts = _losses(wrapped(x), y)
    found = jac([losses], list(model.parameters()), count=counts, retain_graph=True)
    rows = torch.cat([whole(r).flatten(1) for r in found], dim=1)
    if not sharded:  # there they are this rank's estimates
        assert rows.isfinite().all()
        torch.distributed.all_reduce(rows)
        rows /= world_size
    backward([losses], UPGrad(), count=counts)
    return {"rows": rows, "gradient": whole_gradients(model)}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("world_size", "kind"),
    [(1, "even"), (2, "empty"), (3, "uneven"), (4, "empty")],
)
def test_any_split_gives_the_rows_of_one_process(world_size: int, kind: str, sharded: bool) -> None:
    rows, gradient = _expected()
    for found in run_ranks(_found, world_size, kind, sharded):
        assert relative_error(found["rows"], rows) <= BOUND
        assert relative_error(found["gradient"], gradient) <= BOUND


def _refusals(rank: int, world_size: int) -> None:
    model = make_network()
    wrapped = wrap(model)
    x, _ = make_data()
    parameters = list(model.parameters())

    def tasks() -> Tensor:
        return wrapped(x).mean(dim=0)

    attach(wrapped, objectives=Shard(0))
    with pytest.raises((ValueError, RankError), match=r'expected it with Partial\("avg"\)'):
        backward([tasks()], count=3)
    attach(wrapped, objectives=Partial("avg"))
    # Wrong on one rank: all of them raise.
    with pytest.raises((ValueError, RankError), match="expected one finite, non-negative number"):
        backward([tasks()], count=-1 if rank == 1 else 3)
    with pytest.raises((ValueError, RankError), match="expected one finite, non-negative number"):
        jac([tasks()], parameters, count=[1.0] if rank == 1 else 3)
    with pytest.raises(LayoutMismatchError, match="number of rows"):
        jac([tasks()[: 2 + rank]], parameters, count=3)
    assert all(p.grad is None and not hasattr(p, "jac") for p in parameters)


def test_refusals_reach_every_rank() -> None:
    run_ranks(_refusals, 3)


def test_one_process_takes_counts_too() -> None:
    rows, _ = _expected()
    torch.manual_seed(2)
    model, (x, y) = make_network(), make_data()
    losses, counts = _losses(model(x), y)
    found = jac([losses], list(model.parameters()), count=counts, distribution=Local())
    assert relative_error(torch.cat([r.flatten(1) for r in found], dim=1), rows) <= BOUND
