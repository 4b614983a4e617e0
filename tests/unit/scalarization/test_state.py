"""What scalarizers learn and remember is in their state_dict, and can be forgotten."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from jddist import Stateful
from jddist.scalarization import DWA, FAMO, IMTLL, UW, Scalarizer
from tests.unit.scalarization._cases import STATELESS, make, values_of

STATEFUL = ["DWA", "FAMO", "FAMO-full", "IMTLL", "UW"]
DTYPES = [torch.float64, torch.float32]
SHAPE = (3, 2)


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _run(scalarizer: Scalarizer, steps: range, dtype: torch.dtype) -> Tensor:
    """Scalars and gradients of some steps; an epoch of DWA has three."""
    results = []
    for step in steps:
        values = values_of(SHAPE, step, dtype)
        result = scalarizer(values)
        for parameter in scalarizer.parameters():
            parameter.grad = None
        result.backward()
        assert values.grad is not None
        results.append(torch.cat([result.detach()[None], values.grad.flatten()]))
        if isinstance(scalarizer, FAMO):
            scalarizer.update(values_of(SHAPE, step + 100, dtype))
        if isinstance(scalarizer, DWA) and step % 3 == 2:
            scalarizer.step()
        with torch.no_grad():
            for parameter in scalarizer.parameters():
                parameter -= 0.1 * parameter.grad
    return torch.stack(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_fresh_instance_resumes(name: str, steps: int, dtype: torch.dtype) -> None:
    expected = _run(make(name, SHAPE, dtype), range(steps + 6), dtype)[steps:]
    first, second = make(name, SHAPE, dtype), make(name, SHAPE, dtype)
    _run(first, range(steps), dtype)
    second.load_state_dict(_through_a_file(first.state_dict()))
    assert torch.equal(_run(second, range(steps, steps + 6), dtype), expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", STATEFUL)
def test_a_distributed_checkpoint_resumes(name: str, tmp_path: Path) -> None:
    first, second = make(name, SHAPE), make(name, SHAPE)
    _run(first, range(7), torch.float64)
    expected = _run(copy.deepcopy(first), range(7, 10), torch.float64)
    dcp.save(first.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = second.state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    second.load_state_dict(state)
    assert torch.equal(_run(second, range(7, 10), torch.float64), expected)


@pytest.mark.parametrize("name", STATEFUL)
def test_the_state_counts(name: str) -> None:
    used = make(name, SHAPE)
    _run(used, range(7), torch.float64)
    fresh = _run(make(name, SHAPE), range(7, 13), torch.float64)
    assert not torch.equal(_run(used, range(7, 13), torch.float64), fresh)


@pytest.mark.parametrize("name", STATEFUL)
def test_reset_forgets_everything(name: str) -> None:
    used = make(name, SHAPE)
    assert isinstance(used, Stateful)
    expected = _run(make(name, SHAPE), range(6), torch.float64)
    _run(used, range(3, 10), torch.float64)
    used.reset()
    assert torch.equal(_run(used, range(6), torch.float64), expected)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_fresh_state_clears_a_used_instance(name: str) -> None:
    used = make(name, SHAPE)
    _run(used, range(7), torch.float64)
    used.load_state_dict(_through_a_file(make(name, SHAPE).state_dict()))
    expected = _run(make(name, SHAPE), range(6), torch.float64)
    assert torch.equal(_run(used, range(6), torch.float64), expected)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_copy_of_the_state_does_not_change(name: str) -> None:
    first, second = make(name, SHAPE), make(name, SHAPE)
    _run(first, range(4), torch.float64)
    expected = _run(copy.deepcopy(first), range(4, 8), torch.float64)
    second.load_state_dict(first.state_dict())
    _run(first, range(10, 14), torch.float64)
    assert torch.equal(_run(second, range(4, 8), torch.float64), expected)


def test_famo_resumes_between_call_and_update() -> None:
    first, second = FAMO(3), FAMO(3)
    # The values keep their own dtype, though the logits are float32.
    first(values_of((3,)))
    second.load_state_dict(_through_a_file(first.state_dict()))
    for famo in (first, second):
        famo.update(values_of((3,), 1))
    assert torch.equal(first._w, second._w)
    assert not torch.equal(first._w, torch.zeros(3))


def test_only_learned_scalarizers_have_parameters() -> None:
    names = {name: [n for n, _ in make(name, SHAPE).named_parameters()] for name in STATEFUL}
    assert names == {
        "DWA": [],
        "FAMO": [],
        "FAMO-full": [],
        "IMTLL": ["log_scale"],
        "UW": ["log_var"],
    }


@pytest.mark.parametrize("name", STATELESS)
def test_the_others_remember_nothing(name: str) -> None:
    scalarizer = make(name, SHAPE)
    assert not isinstance(scalarizer, Stateful)
    values = values_of(SHAPE)
    first = scalarizer(values)
    scalarizer(values_of(SHAPE, 1))
    assert torch.equal(scalarizer(values), first)
    assert scalarizer.state_dict() == {}


def test_famo_with_changed_rates_learns_by_them() -> None:
    famo = FAMO(2)
    famo.lr = 0.0
    famo(torch.tensor([1.0, 2.0]))
    famo.update(torch.tensor([0.5, 2.0]))
    assert torch.equal(famo._w, torch.zeros(2))


def test_no_graph_is_kept() -> None:
    dwa, famo = DWA(), FAMO(2)
    values = torch.ones(2, requires_grad=True)
    for scalarizer in (dwa, famo):
        scalarizer(values)
    dwa.step()
    famo.update(values)
    assert not any(t.requires_grad for t in [*dwa._averages, *famo.buffers(), famo._before])


@pytest.mark.parametrize("scalarizer", [IMTLL(2), UW(2)], ids=str)
def test_reset_keeps_the_parameter_itself(scalarizer: IMTLL | UW) -> None:
    """The optimizer has it."""
    (before,) = scalarizer.parameters()
    with torch.no_grad():
        before += 1.0
    scalarizer.reset()
    (after,) = scalarizer.parameters()
    assert after is before
    assert torch.equal(after, torch.zeros(2))
