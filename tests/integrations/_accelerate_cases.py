"""Accelerate on several ranks: parameters after each step, for the test of the same name."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from jddist import attach
from jddist.aggregation import GradVacWeighting, UPGradWeighting
from jddist.autogram import Engine
from jddist.errors import NonFiniteObjectiveError
from jddist.integrations.accelerate import backward
from tests.distributed._training import (
    LOSSES,
    OPTIMIZERS,
    STEPS,
    local_part,
    make_data,
    make_network,
    parameters_of,
    upgrad_for,
)
from tests.integrations._host import as_launched
from tests.integrations._reference import CLIP, MICRO, failure_of, task_step

CASES: dict[str, dict[str, Any]] = {
    "instance": {"objective": "instance", "optimizer": "adamw", "kind": "uneven"},
    "instance, empty": {"objective": "instance", "kind": "empty"},
    "instance, accumulated": {"objective": "instance", "micro": 2, "kind": "uneven"},
    "instance x task": {"objective": "instance x task", "kind": "uneven"},
    "task": {"objective": "task", "kind": "uneven"},
    "task, accumulated": {"objective": "task", "micro": 2, "optimizer": "adamw", "kind": "uneven"},
    "clipped": {"objective": "instance", "micro": 2, "clip": True, "kind": "even"},
    "bf16": {"objective": "instance", "bf16": True, "kind": "even"},
    "bf16, task": {"objective": "task", "bf16": True, "kind": "even", "micro": 2},
}


def run(rank: int, world_size: int) -> dict[str, Any]:
    as_launched(rank, world_size)
    result: dict[str, Any] = {name: _train(rank, world_size, **c) for name, c in CASES.items()}
    result["bare root"] = _bare_root(rank, world_size)
    result["nan"] = _nan(rank, world_size)
    result["scaler"], result["overflow"] = _scaler(rank, world_size)
    result["groups"] = _groups(rank, world_size)
    result["resumed"] = _resumed(rank, world_size)
    return result


def _accelerator(micro: int = 1, bf16: bool = False) -> Accelerator:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    precision = "bf16" if bf16 else "no"
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=micro, mixed_precision=precision
    )
    assert accelerator.num_processes == torch.distributed.get_world_size()
    return accelerator


def _train(
    rank: int,
    world_size: int,
    *,
    objective: str,
    kind: str,
    optimizer: str = "sgd",
    micro: int = 1,
    clip: bool = False,
    bf16: bool = False,
) -> list[Tensor]:
    accelerator = _accelerator(micro, bf16)
    network, data = make_network(), make_data()
    if bf16:
        network, data = network.float(), (data[0].float(), data[1].float())
    model, opt = accelerator.prepare(network, OPTIMIZERS[optimizer](list(network.parameters())))
    engine = Engine(model, batch_dim=None if objective == "task" else 0)
    result = []
    for _ in range(STEPS):
        for part in MICRO[micro]:
            x, y = (local_part(t[part], rank, world_size, kind) for t in data)
            with accelerator.accumulate(model):
                losses = LOSSES[objective](model(x), y)
                count = len(x) if objective == "task" else None
                weights = backward(accelerator, engine, losses, upgrad_for(losses), count=count)
                assert weights.isfinite().all() and weights.dtype == losses.dtype
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                opt.step()
                opt.zero_grad()
        result.append(parameters_of(network))
    return result


def _scaler(rank: int, world_size: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Under a GradScaler, as Accelerate makes one for fp16, here in float64; and with overflow."""
    accelerator = _accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    network = make_network()
    model, opt = accelerator.prepare(network, OPTIMIZERS["sgd"](list(network.parameters())))
    engine = Engine(model, batch_dim=0)
    x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())

    def step(factor: float = 1.0) -> Tensor:
        losses = LOSSES["instance"](model(x), y) * factor
        weights = backward(accelerator, engine, losses, UPGradWeighting())
        opt.step()
        opt.zero_grad()
        return weights

    trace = []
    for _ in range(STEPS):
        step()
        trace.append(parameters_of(network))
    weights = step(1e306 if rank == 1 else 1.0)
    return trace, {
        "weights": bool(weights.isnan().all()),
        "skipped": torch.equal(parameters_of(network), trace[-1]) and opt.step_was_skipped,
        "scale": accelerator.scaler.get_scale(),
    }


def _groups(rank: int, world_size: int) -> list[Tensor]:
    """Explicit Jacobians by groups of parameters, on what Accelerate prepared."""
    accelerator = _accelerator()
    network = make_network()
    model, opt = accelerator.prepare(network, OPTIMIZERS["sgd"](list(network.parameters())))
    attach(model)
    x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())
    result = []
    for _ in range(STEPS):
        opt.zero_grad()
        task_step(network, model, x, y)
        opt.step()
        result.append(parameters_of(network))
    return result


def _resumed(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    """Four steps in one go; and two steps, a checkpoint of Accelerate's, and two more."""
    folder = [tempfile.mkdtemp(prefix="jddist-accelerate-")] if rank == 0 else [""]
    dist.broadcast_object_list(folder, 0)
    x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())

    def train(steps: int, load: bool, register: bool = True) -> list[Tensor]:
        accelerator = _accelerator()
        network = make_network()
        model, opt = accelerator.prepare(network, OPTIMIZERS["adamw"](list(network.parameters())))
        engine = Engine(model, batch_dim=0)
        weighting = GradVacWeighting(generator=torch.Generator().manual_seed(3))
        if register:
            accelerator.register_for_checkpointing(weighting)
        if load:
            accelerator.load_state(folder[0])
        result = []
        for step in range(steps):
            if steps == 4 and step == 2:
                accelerator.save_state(folder[0])
            backward(accelerator, engine, LOSSES["instance"](model(x), y), weighting)
            opt.step()
            opt.zero_grad()
            result.append(parameters_of(network))
        return result

    try:
        whole = train(4, load=False)
        resumed = train(2, load=True)
        (Path(folder[0]) / "custom_checkpoint_0.pkl").unlink(missing_ok=True)
        dist.barrier()
        return {"whole": whole, "resumed": resumed, "forgetful": train(2, True, register=False)}
    finally:
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder[0])


def _bare_root(rank: int, world_size: int) -> list[Tensor]:
    """A model that is one layer: Accelerate replaces the ``forward`` of the layer itself."""
    accelerator = _accelerator(bf16=True)
    torch.manual_seed(0)
    layer = nn.Linear(5, 1)
    (x, _) = make_data()
    model = accelerator.prepare(layer)
    engine = Engine(model, batch_dim=0)
    losses = model(local_part(x.float(), rank, world_size, "uneven")).square().squeeze(1)
    with warnings.catch_warnings():
        # The hooks run outside of its autocast, so bf16's rounding may look like a wrong row.
        warnings.filterwarnings("ignore", "The rows of the parameters")
        gramian = engine.compute_gramian(losses)
    return [gramian, *[p.detach() for p in layer.parameters()]]


def _nan(rank: int, world_size: int) -> dict[str, Any]:
    """Refused with gradients untouched; or skipped, and nothing is written."""
    accelerator = _accelerator()
    network, (x, _) = make_network(), make_data()
    model = accelerator.prepare(network)
    result: dict[str, Any] = {}

    def step(engine: Engine, factor: float) -> Tensor:
        losses = model(local_part(x, rank, world_size, "uneven")).square().sum(1) * factor
        return backward(accelerator, engine, losses, UPGradWeighting())

    factor = float("nan") if rank == 1 else 1.0
    engine = Engine(model, batch_dim=0)
    result["raised"] = failure_of(lambda: step(engine, factor), NonFiniteObjectiveError)
    result["grads"] = sum(p.grad is not None for p in network.parameters())
    lenient = Engine(model, batch_dim=0, nonfinite="skip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result["skipped"] = float(step(lenient, factor).abs().sum())
    result["warned"] = any("weights of this step are zero" in str(w.message) for w in caught)
    result["grads after skip"] = float(
        sum(p.grad.abs().sum() for p in network.parameters() if p.grad is not None)
    )
    result["goes on"] = bool(step(lenient, 1.0).isfinite().all())
    return result
