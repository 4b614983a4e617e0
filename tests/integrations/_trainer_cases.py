"""Transformers' Trainer on several ranks: what happened, for the test of the same name."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from jddist.aggregation import Flattening, GradVacWeighting, UPGradWeighting
from jddist.errors import NonFiniteObjectiveError
from jddist.integrations.transformers import JacobianDescentMixin, JacobianDescentTrainer
from tests.distributed._training import FEATURES, LOSSES, OPTIMIZERS, TASKS, parameters_of
from tests.distributed._training import make_network as make_inner
from tests.integrations._host import as_launched
from tests.integrations._reference import failure_of

SAMPLES, PER_STEP, STEPS = 59, 12, 5  # the last batch is not full

CASES: dict[str, dict[str, Any]] = {
    "instance": {"objective": "instance", "optimizer": "adamw"},
    "matrix": {"objective": "instance x task"},
    "task": {"objective": "task"},
    "accumulated": {"objective": "instance", "micro": 2},
    "task, accumulated": {"objective": "task", "micro": 2},
    "clipped": {"objective": "instance", "clip": 0.5},
    "bf16": {"objective": "instance", "bf16": True, "rows": 60},
}


class Model(nn.Module):
    """The network of the other tests, with the Trainer's arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.network = make_inner()

    def forward(self, x: Tensor) -> Any:
        return SequenceClassifierOutput(logits=self.network(x))


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, rows: int = SAMPLES, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randn(rows, TASKS, generator=generator, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(TASKS, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


class Classes(Rows):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset or self.train_dataset)


class Descent(JacobianDescentMixin, InOrder):
    objective = "instance"

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        out = model(inputs["x"]).logits
        return LOSSES[self.objective](out.to(inputs["x"].dtype), inputs["y"])


class Watches(TrainerCallback):
    """The parameters after each step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.trace = model, list[Tensor]()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trace.append(parameters_of(self.model))


def run(rank: int, world_size: int) -> dict[str, Any]:
    as_launched(rank, world_size)
    folder = [tempfile.mkdtemp(prefix="jddist-trainer-")] if rank == 0 else [""]
    dist.broadcast_object_list(folder, 0)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            # The Trainer's loaders pin memory by default.
            warnings.filterwarnings("ignore", ".*pin_memory.*")
            result = {n: _case(rank, world_size, Path(folder[0]), **c) for n, c in CASES.items()}
            if world_size == 2:
                result["classes"] = _classes(world_size, Path(folder[0]))
                result["resumed"] = _resumed(world_size, Path(folder[0]))
                result["refused"] = _refused(rank, world_size, Path(folder[0]))
    finally:
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder[0])
    return result


def _arguments(folder: Path, world_size: int, micro: int = 1, **options: Any) -> TrainingArguments:
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    GradientState._reset_state()
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": PER_STEP // micro // world_size,
        "gradient_accumulation_steps": micro,
        "num_train_epochs": 1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "accelerator_config": {"even_batches": False},
        "remove_unused_columns": False,
    }
    return TrainingArguments(**(settings | options))


def _optimizers(model: nn.Module, name: str = "sgd") -> tuple[Any, Any]:
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def _case(
    rank: int,
    world_size: int,
    folder: Path,
    *,
    objective: str,
    optimizer: str = "sgd",
    micro: int = 1,
    clip: float = 0.0,
    bf16: bool = False,
    rows: int = SAMPLES,
) -> dict[str, Any]:
    micro_options: dict[str, Any] = {"max_grad_norm": clip, "bf16": bf16}
    model = Model().float() if bf16 else Model()
    arguments = _arguments(folder, world_size, micro, **micro_options)
    matrix = objective == "instance x task"
    trainer = Descent(
        model,
        arguments,
        train_dataset=Rows(rows, torch.float32 if bf16 else torch.float64),
        optimizers=_optimizers(model, optimizer),
        weighting=Flattening(UPGradWeighting()) if matrix else UPGradWeighting(),
        batch_dim=None if objective == "task" else 0,
    )
    trainer.objective = objective
    watch = Watches(model)
    trainer.add_callback(watch)
    trainer.train()
    logged = [{k: float(v) for k, v in entry.items()} for entry in trainer.state.log_history]
    return {"parameters": watch.trace, "log": logged}


def _classes(world_size: int, folder: Path) -> list[Tensor]:
    """The default losses, and the Trainer that needs no subclass."""
    model = Model()
    arguments = _arguments(folder, world_size, max_steps=1)
    trainer = JacobianDescentTrainer(
        model,
        arguments,
        train_dataset=Classes(PER_STEP),
        optimizers=_optimizers(model),
        weighting=UPGradWeighting(),
    )
    trainer.train()
    return [parameters_of(model)]


def _stateful(world_size: int, folder: Path, **options: Any) -> tuple[Descent, Watches]:
    model = Model()
    arguments = _arguments(folder, world_size, save_strategy="steps", save_steps=2, **options)
    trainer = Descent(
        model,
        arguments,
        train_dataset=Rows(48),
        optimizers=_optimizers(model, "adamw"),
        weighting=GradVacWeighting(generator=torch.Generator().manual_seed(3)),
    )
    watch = Watches(model)
    trainer.add_callback(watch)
    return trainer, watch


def _resumed(world_size: int, folder: Path) -> dict[str, Any]:
    """Four steps in one go, and with an interruption after two."""
    whole, watch = _stateful(world_size, folder / "resumed")
    whole.train()
    again, later = _stateful(world_size, folder / "resumed")
    again.train(resume_from_checkpoint=str(folder / "resumed" / "checkpoint-2"))
    forgetful, without = _stateful(world_size, folder / "resumed")
    forgetful.weighting.load_state_dict = lambda *_: None
    forgetful.train(resume_from_checkpoint=str(folder / "resumed" / "checkpoint-2"))
    newest, after = _stateful(world_size, folder / "resumed", num_train_epochs=2)
    newest.train(resume_from_checkpoint=True)
    state = folder / "resumed" / "checkpoint-2" / "jddist_weighting.pt"
    dist.barrier()
    if dist.get_rank() == 0:
        state.unlink()
    dist.barrier()
    missing, _ = _stateful(world_size, folder / "resumed")
    return {
        "whole": watch.trace,
        "resumed": later.trace,
        "forgetful": without.trace,
        "newest": len(after.trace),
        "missing": failure_of(
            lambda: missing.train(str(folder / "resumed" / "checkpoint-2")), ValueError
        ),
    }


class Nan(Descent):
    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        losses = super().compute_losses(model, inputs)
        return losses * float("nan") if dist.get_rank() == 1 else losses


def _refused(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    def train(kind: type[JacobianDescentMixin]) -> None:
        model = Model()
        kind(
            model,
            _arguments(folder, world_size),
            train_dataset=Rows(),
            optimizers=_optimizers(model),
            weighting=UPGradWeighting(),
        ).train()

    return {
        "nan": failure_of(lambda: train(Nan), NonFiniteObjectiveError),
        "no losses": failure_of(lambda: train(JacobianDescentTrainer), ValueError),
    }
