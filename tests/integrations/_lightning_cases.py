"""Lightning on several ranks: parameters after each step, for the test of the same name."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from jddist import attach
from jddist.aggregation import GradVacWeighting, UPGradWeighting
from jddist.autogram import Engine
from jddist.errors import NonFiniteObjectiveError, UnsupportedModelError
from jddist.integrations.lightning import JacobianDescent, backward
from tests.distributed._sharded import whole_parameters
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

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "ddp": DDPStrategy,
    "ddp unused": lambda: DDPStrategy(find_unused_parameters=True),
    "ddp static": lambda: DDPStrategy(static_graph=True),
    "ddp views": lambda: DDPStrategy(gradient_as_bucket_view=True),
    "fully_shard": lambda: ModelParallelStrategy(
        data_parallel_size=torch.distributed.get_world_size(), tensor_parallel_size=1
    ),
}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {"objective": "instance", "optimizer": "adamw", "kind": "uneven"},
    "ddp, empty": {"objective": "instance", "kind": "empty"},
    "ddp, matrix": {"objective": "instance x task", "kind": "uneven"},
    "ddp, accumulated": {"objective": "instance", "micro": 2, "kind": "uneven"},
    "ddp, no_sync": {"objective": "instance", "micro": 2, "no_sync": True, "kind": "uneven"},
    "ddp, task": {"objective": "task", "kind": "uneven", "micro": 2},
    "ddp, clipped": {"objective": "instance", "clip": True, "kind": "even"},
    "ddp, bf16": {"objective": "instance", "bf16": True, "kind": "even"},
    "ddp unused": {"objective": "instance", "kind": "uneven"},
    "ddp static": {"objective": "instance", "kind": "uneven"},
    "ddp static, accumulated": {"objective": "instance", "micro": 2, "kind": "uneven"},
    "ddp static, task": {"objective": "task", "kind": "uneven"},
    "ddp static, clipped": {"objective": "instance", "clip": True, "kind": "even"},
    "ddp static, bf16": {"objective": "instance", "bf16": True, "kind": "even"},
    "ddp views": {"objective": "instance", "micro": 2, "kind": "uneven"},
    "fully_shard": {"objective": "instance", "optimizer": "adamw", "kind": "uneven"},
    "fully_shard, empty": {"objective": "instance", "kind": "empty"},
    "fully_shard, accumulated": {"objective": "instance", "micro": 2, "kind": "uneven"},
    "fully_shard, task": {"objective": "task", "kind": "uneven", "micro": 2},
    "fully_shard, clipped": {"objective": "instance", "clip": True, "kind": "even"},
    "fully_shard, bf16": {"objective": "instance", "bf16": True, "kind": "even"},
}


def run(rank: int, world_size: int) -> dict[str, Any]:
    as_launched(rank, world_size)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # On how many workers a loader should have, and of Lightning's own use of torch's trees.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*", FutureWarning)
        result: dict[str, Any] = {n: _fit(rank, world_size, n, **c) for n, c in CASES.items()}
        result |= _traps(rank, world_size)
        groups = Groups(rank, world_size, {"objective": "task", "kind": "uneven"})
        _fit_module(groups, "ddp")
        result["groups"] = groups.trace
        result["scaler"], result["overflow"] = _scaler(rank, world_size)
        result["resumed"] = _resumed(rank, world_size)
    return result


class Module(LightningModule):
    """The network of the other tests; a batch is nothing but its number."""

    with_callback = True

    def __init__(self, rank: int, world_size: int, case: dict[str, Any]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = make_network()
        self.case = case
        data = make_data()
        if case.get("bf16"):
            self.network, data = self.network.float(), (data[0].float(), data[1].float())
        self.parts = [
            [local_part(t[part], rank, world_size, case["kind"]) for t in data]
            for part in MICRO[case.get("micro", 1)]
        ]
        self.trace: list[Tensor] = []

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for child in self.network.children():
                fully_shard(child, mesh=mesh)
            fully_shard(self.network, mesh=mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.case.get("optimizer", "sgd")](list(self.parameters()))

    def training_step(self, batch: int, index: int) -> None:
        """One micro-batch: gradients add up until the last one of the step."""
        optimizer = self.optimizers()
        micro = len(self.parts)
        x, y = self.parts[index % micro]
        last = index % micro == micro - 1
        if index % micro == 0:
            optimizer.zero_grad()
        waits = self.case.get("no_sync") and not last
        with self.trainer.model.no_sync() if waits else nullcontext():
            self.step(LOSSES[self.case["objective"]](self.network(x).to(x.dtype), y), len(x))
        if last:
            if self.case.get("clip"):
                self.clip_gradients(optimizer, CLIP, gradient_clip_algorithm="norm")
            optimizer.step()
            self.trace.append(whole_parameters(self.network))

    def step(self, losses: Tensor, samples: int) -> None:
        count = samples if self.case["objective"] == "task" else None
        weights = backward(self, losses, upgrad_for(losses), count=count)
        assert weights.isfinite().all()


def _trainer(
    strategy: str,
    callback: JacobianDescent,
    *,
    bf16: bool = False,
    max_epochs: int = 1,
    plugins: list[MixedPrecision] | None = None,
) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=torch.distributed.get_world_size(),
        strategy=STRATEGIES[strategy](),
        precision=None if plugins else "bf16-mixed" if bf16 else "32-true",
        plugins=plugins,
        max_epochs=max_epochs,
        use_distributed_sampler=False,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _fit_module(module: Module, strategy: str) -> None:
    batch_dim = None if module.case["objective"] == "task" else 0
    callback = JacobianDescent(UPGradWeighting(), batch_dim=batch_dim)
    steps = STEPS * len(module.parts)
    loader = DataLoader(list(range(steps)), batch_size=None)  # type: ignore[arg-type]
    trainer = _trainer(strategy, callback, bf16=module.case.get("bf16", False))
    if not module.with_callback:
        trainer.callbacks.remove(callback)
    trainer.fit(module, loader)


def _fit(rank: int, world_size: int, name: str, **case: Any) -> list[Tensor]:
    module = Module(rank, world_size, case)
    _fit_module(module, name.split(",")[0])
    return module.trace


class Directly(Module):
    """What a script does that does not know that Lightning is inside of DDP's forward."""

    def step(self, losses: Tensor, samples: int) -> None:
        losses.sum().backward()


class ByHand(Module):
    """Step by step, as the design has it."""

    with_callback = False

    engine: Engine | None = None

    def on_train_start(self) -> None:
        self.engine = Engine(self.trainer.strategy.model, batch_dim=0)

    def step(self, losses: Tensor, samples: int) -> None:
        assert self.engine is not None
        weights = self.engine.compute_weights(
            self.engine.compute_gramian(losses), UPGradWeighting()
        )
        self.manual_backward(losses, gradient=self.engine.local_weights(weights))


class ByEngine(ByHand):
    """The engine's own step, which takes the wrapper's backward; no callback notices it."""

    def step(self, losses: Tensor, samples: int) -> None:
        handle = self.network.last.bias.register_hook(lambda grad: grad)  # wants a real backward
        assert self.engine is not None
        try:
            self.engine.backward(losses, UPGradWeighting())
        finally:
            handle.remove()


class Nan(Module):
    def step(self, losses: Tensor, samples: int) -> None:
        bad = self.trainer.global_rank == 1
        backward(self, losses * float("nan") if bad else losses)


class Groups(Module):
    """Explicit Jacobians by groups of parameters: no backward of DDP's is involved."""

    def on_train_start(self) -> None:
        attach(self.trainer.strategy.model)

    def training_step(self, batch: int, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        task_step(self.network, self.network, *self.parts[0])
        optimizer.step()
        self.trace.append(parameters_of(self.network))


class Exact(MixedPrecision):
    """A GradScaler without narrow numbers, so that only the scaler is looked at."""

    def __init__(self) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        super().__init__("16-mixed", "cpu", scaler)

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast("cpu", enabled=False)


class Overflows(Module):
    """After its steps another one, in which one rank's losses are too large."""

    factor = 1.0

    def on_train_batch_start(self, batch: int, index: int) -> None:
        if index == STEPS and self.trainer.global_rank == 1:
            self.factor = 1e306

    def step(self, losses: Tensor, samples: int) -> None:
        self.weights = backward(self, losses * self.factor)


def _scaler(rank: int, world_size: int) -> tuple[list[Tensor], dict[str, Any]]:
    module = Overflows(rank, world_size, {"objective": "instance", "kind": "uneven"})
    callback, precision = JacobianDescent(UPGradWeighting(), batch_dim=0), Exact()
    trainer = _trainer("ddp", callback, plugins=[precision])
    loader = DataLoader(list(range(STEPS + 1)), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    *trace, last = module.trace
    assert precision.scaler is not None
    return trace, {
        "weights": bool(module.weights.isnan().all()),
        "skipped": torch.equal(last, trace[-1]),
        "scale": precision.scaler.get_scale(),
    }


def _resumed(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    """Two epochs in one go; and one, a checkpoint of Lightning's, and the other."""
    folder = [tempfile.mkdtemp(prefix="jddist-lightning-")] if rank == 0 else [""]
    torch.distributed.broadcast_object_list(folder, 0)
    file = str(Path(folder[0]) / "half.ckpt")
    case = {"objective": "instance", "optimizer": "adamw", "kind": "uneven"}

    class Stateful(Module):
        def step(self, losses: Tensor, samples: int) -> None:
            backward(self, losses)

    def fit(epochs: int, *, save: bool = False, load: bool = False) -> list[Tensor]:
        weighting = GradVacWeighting(generator=torch.Generator().manual_seed(3))
        callback = JacobianDescent(weighting, batch_dim=0)
        trainer = _trainer("ddp", callback, max_epochs=epochs)
        module = Stateful(rank, world_size, case)
        loader = DataLoader([0, 1], batch_size=None)  # type: ignore[arg-type]
        trainer.fit(module, loader, ckpt_path=file if load else None, weights_only=load or None)
        if save:
            trainer.save_checkpoint(file)
        return module.trace

    try:
        whole, half = fit(2), fit(1, save=True)
        rest = fit(2, load=True)
        keep, JacobianDescent.load_state_dict = JacobianDescent.load_state_dict, lambda *_: None
        forgetful = fit(2, load=True)
        JacobianDescent.load_state_dict = keep
        return {"whole": whole, "half": half, "resumed": rest, "forgetful": forgetful}
    finally:
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(folder[0])


def _traps(rank: int, world_size: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    case = {"objective": "instance", "kind": "uneven"}
    for strategy in ("ddp", "ddp static"):
        for kind, error in (
            (Directly, RuntimeError),
            (ByEngine, RuntimeError),
            (Nan, NonFiniteObjectiveError),
        ):
            module = kind(rank, world_size, case)
            message = failure_of(lambda m=module, s=strategy: _fit_module(m, s), error)
            unmoved = torch.equal(parameters_of(module.network), parameters_of(make_network()))
            result[f"{strategy}, {kind.__name__}"] = [message, unmoved]
        module = ByHand(rank, world_size, case)
        _fit_module(module, strategy)
        result[f"{strategy}, by hand"] = module.trace
    module = Module(rank, world_size, case)
    module.automatic_optimization = True
    result["automatic"] = failure_of(lambda: _fit_module(module, "ddp"), UnsupportedModelError)
    plain = Module(rank, world_size, case)
    plain.with_callback = False
    result["no callback"] = failure_of(lambda: _fit_module(plain, "ddp"), RuntimeError)
    return result
