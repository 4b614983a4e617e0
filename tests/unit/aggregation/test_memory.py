"""What the stateful methods remember, in one process: saved, loaded, copied, forgotten."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from jddist._stateful import Stateful
from jddist.aggregation import (
    DBMTL,
    Aggregator,
    CRMOGMWeighting,
    ExcessMTL,
    ExcessMTLWeighting,
    GradNorm,
    GradVac,
    GradVacWeighting,
    GramianWeightedAggregator,
    MoCo,
    MoDoWeighting,
    SDMGradWeighting,
    UPGradWeighting,
    WeightedAggregator,
)
from jddist.aggregation._losses import NeedsLosses
from jddist.autojac import allocate_state, jac_to_grad
from tests.unit.aggregation._matrices import make_matrix

METHODS: dict[str, Callable[[], Aggregator]] = {
    "CRMOGM(ExcessMTL)": lambda: WeightedAggregator(CRMOGMWeighting(ExcessMTLWeighting())),
    "CRMOGM(GradVac)": lambda: GramianWeightedAggregator(CRMOGMWeighting(GradVacWeighting())),
    "CRMOGM(UPGrad)": lambda: GramianWeightedAggregator(CRMOGMWeighting(UPGradWeighting())),
    "DBMTL": DBMTL,
    "ExcessMTL": ExcessMTL,
    "ExcessMTL, warm": lambda: ExcessMTL(0.1, n_warmup_steps=4),
    "GradNorm": GradNorm,
    "GradVac": GradVac,
    "MoCo": MoCo,
    "MoDo": lambda: GramianWeightedAggregator(MoDoWeighting()),
    "SDMGrad": lambda: GramianWeightedAggregator(SDMGradWeighting()),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())


def _state_losses(aggregator: nn.Module, m: int, call: int) -> None:
    for module in aggregator.modules():
        if isinstance(module, NeedsLosses):
            module.set_losses(torch.arange(1.0, m + 1.0) / (call + 1))
            return


def _run(
    aggregator: Aggregator, calls: range, m: int = 4, n: int = 11, dtype: Any = torch.float64
) -> Tensor:
    results = []
    for call in calls:
        torch.manual_seed(call)
        _state_losses(aggregator, m, call)
        results.append(aggregator(make_matrix("conflicting", m, call, n=n).to(dtype)))
    return torch.stack(results)


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_fresh_instance_resumes(make: Callable[[], Aggregator], dtype: torch.dtype) -> None:
    expected = _run(make(), range(6), dtype=dtype)
    first, second = make(), make()
    _run(first, range(3), dtype=dtype)
    second.load_state_dict(_through_a_file(first.state_dict()))
    assert torch.equal(_run(second, range(3, 6), dtype=dtype), expected[3:])
    copied = deepcopy(first)
    assert torch.equal(_run(copied, range(3, 6), dtype=dtype), expected[3:])
    assert torch.equal(_run(first, range(3, 6), dtype=dtype), expected[3:])


@every_method
def test_the_state_counts_and_is_forgotten(make: Callable[[], Aggregator]) -> None:
    fresh, used = _run(make(), range(3, 6)), make()
    _run(used, range(3))
    assert not torch.equal(_run(used, range(3, 6)), fresh)
    stateful = used if isinstance(used, Stateful) else getattr(used, "gramian_weighting", None)
    stateful = stateful or getattr(used, "weighting")  # noqa: B009
    assert isinstance(stateful, Stateful)
    stateful.reset()
    assert torch.equal(_run(used, range(3, 6)), fresh)
    used.load_state_dict(_through_a_file(make().state_dict()))
    assert torch.equal(_run(used, range(3, 6)), fresh)


@every_method
def test_the_state_is_a_copy_in_both_directions(make: Callable[[], Aggregator]) -> None:
    first, second = make(), make()
    _run(first, range(2))
    state = first.state_dict()
    before = deepcopy(state)
    second.load_state_dict(state)
    _run(first, range(2, 4))
    _run(second, range(2, 4))
    for name, value in before.items():
        values = value if isinstance(value, dict) else {"": value}
        for key, tensor in values.items():
            assert type(tensor) is Tensor
            assert torch.equal((state[name][key] if key else state[name]), tensor)


@every_method
def test_another_shape_or_precision_starts_afresh(make: Callable[[], Aggregator]) -> None:
    for changed in ({"m": 3}, {"dtype": torch.float32}):
        used = make()
        _run(used, range(3))
        if any(isinstance(module, CRMOGMWeighting) for module in used.modules()):
            if "m" in changed:
                with pytest.raises(ValueError, match="reset"):
                    _run(used, range(2), **changed)
            continue  # the moving average of the weights goes on in the new precision
        assert torch.equal(_run(used, range(2), **changed), _run(make(), range(2), **changed))


@pytest.mark.parametrize("make", [DBMTL, ExcessMTL, MoCo])
def test_another_number_of_columns_starts_afresh(make: Callable[[], Aggregator]) -> None:
    used = make()
    _run(used, range(3))
    assert torch.equal(_run(used, range(2), n=9), _run(make(), range(2), n=9))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as meant: one process
@every_method
def test_a_checkpoint_is_loaded_into_a_new_instance(
    make: Callable[[], Aggregator], tmp_path: Path
) -> None:
    expected = _run(make(), range(6))
    first, second = make(), make()
    _run(first, range(3))
    dcp.save({"aggregator": first.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    position = torch.get_rng_state()
    tensors = [torch.zeros(8, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)]
    allocate_state(tensors, second, 4)
    assert torch.equal(torch.get_rng_state(), position)
    state = {"aggregator": second.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    second.load_state_dict(state["aggregator"])
    assert torch.equal(_run(second, range(3, 6)), expected[3:])


def test_stated_losses_are_no_state() -> None:
    used, fresh = GradNorm(), GradNorm()
    used.set_losses(torch.ones(4))
    used.load_state_dict(fresh.state_dict())
    with pytest.raises(ValueError, match="set_losses"):
        used(make_matrix("random", 4, 0))


def test_in_one_process_jac_to_grad_is_the_aggregator_itself() -> None:
    parameter = torch.zeros(11, dtype=torch.float64, requires_grad=True)
    used = ExcessMTL()
    expected = _run(ExcessMTL(), range(3))
    for call in range(3):
        parameter.grad = None
        parameter.jac = make_matrix("conflicting", 4, call)  # type: ignore[attr-defined]
        jac_to_grad([parameter], used)
        assert torch.equal(parameter.grad, expected[call])  # type: ignore[arg-type]
