"""Transformers' Trainer: Jacobian descent on per-sample or per-task losses.

The Trainer wraps the model; a subclass only says what the losses are::

    class MyTrainer(JacobianDescentMixin, Trainer):
        def compute_losses(self, model, inputs):
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            return F.cross_entropy(logits, labels, reduction="none")  # [b]

    MyTrainer(model, args, train_dataset=..., weighting=UPGradWeighting(), batch_dim=0).train()
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement
from torch.nn.functional import cross_entropy

from jddist.autogram import Engine
from jddist.autogram.step import Weigher
from jddist.distribution.counts import Count

from ._extra import require
from ._observed import Observed

require("transformers", "transformers")
require("accelerate", "transformers")

# What is missing is told first; and there are no stubs.
from accelerate.utils import find_batch_size  # type: ignore[import-untyped]  # noqa: E402
from transformers import (  # noqa: E402
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402

from .accelerate import divided_backward  # noqa: E402

STATE_NAME = "jddist_weighting.pt"


class JacobianDescentMixin:
    """Makes a Trainer take steps of Jacobian descent; put it before the Trainer among the bases.

    Everything else stays the Trainer's: the wrapping of the model, mixed precision, accumulation
    (each micro-batch with weights of its own, then their mean), clipping, schedules, checkpoints.
    Its log gets, as means since the last one, ``jd_conflicts`` (the share of pairs of objectives
    whose gradients conflict), ``jd_weight_min``, ``jd_weight_max`` and ``jd_weight_zero`` (the
    share of objectives of weight zero), and with up to 16 task-wise objectives ``jd_weight_0`` and
    so on. The weighting's state is saved in the Trainer's checkpoints (``jddist_weighting.pt``) and
    restored by ``train(resume_from_checkpoint=...)``.

    Args:
        *args: The Trainer's.
        weighting: Maps the Gramian of the losses to weights.
        batch_dim: The dimension of the samples in the losses; None if they are tasks.
        objectives: Where the objectives live; see ``Engine``.
        engine_options: Further arguments of ``Engine``.
        **kwargs: The Trainer's.
    """

    def __init__(
        self,
        *args: Any,
        weighting: Weigher,
        batch_dim: int | None = 0,
        objectives: Placement | None = None,
        engine_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.weighting = weighting
        self._jd_options = {
            "batch_dim": batch_dim,
            "objectives": objectives,
            **(engine_options or {}),
        }
        self._jd_engine: Engine | None = None
        self._jd_model: nn.Module | None = None
        self._jd_observed = Observed(weighting, single=16 if batch_dim is None else 0)
        self.add_callback(_SavesWeighting(weighting))  # type: ignore[attr-defined]

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The objectives of a batch, with their graph; override it.

        By default each sample's cross-entropy, for models that give ``logits`` [b, classes] and
        batches with ``labels`` [b].

        Args:
            model: The model as the Trainer wrapped it.
            inputs: The batch, on the model's device.

        Returns:
            One loss per sample [b], per task [m] (means over this batch), or any other shape.

        Raises:
            ValueError: The default does not fit.
        """
        labels: Any = inputs.get("labels")
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        logits: Any = getattr(model(**rest), "logits", None) if labels is not None else None
        fits = isinstance(logits, Tensor) and logits.ndim == 2
        if not fits or labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(
                "Found a batch or a model that is not for the classification of samples (logits "
                "[b, classes] and integer labels [b]); expected to know its losses. Override "
                "compute_losses(model, inputs) to return one loss per sample, or per task."
            )
        return cross_entropy(logits, labels, reduction="none")

    def count_samples(self, inputs: dict[str, Any]) -> Count | None:
        """The number of samples that task-wise losses are means over; override it for [m] counts.

        Args:
            inputs: The batch.

        Returns:
            The size of the batch with ``batch_dim=None``, else None.
        """
        if self._jd_options["batch_dim"] is not None:
            return None
        found: int | None = find_batch_size(inputs)
        return found

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward, Gramian, weights and weighted backward of one micro-batch.

        Returns:
            The mean of the losses over the number of micro-batches, for the Trainer's log.
        """
        trainer: Any = self
        model.train()
        if callable(getattr(trainer.optimizer, "train", None)):
            trainer.optimizer.train()
        inputs = trainer._prepare_inputs(inputs)
        engine = self._engine_on(model)
        count = self.count_samples(inputs)
        with trainer.compute_loss_context_manager():
            losses = self.compute_losses(model, inputs)
        steps = trainer.current_gradient_accumulation_steps
        with self._jd_observed.attached() as weighting:
            weights = divided_backward(trainer.accelerator, engine, losses, weighting, count, steps)
        self._jd_observed.add(weights)
        return losses.detach().mean() / steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was observed of weights and conflicts to the Trainer's log of training."""
        if "loss" in logs:
            logs.update(self._jd_observed.pop())
        super().log(logs, start_time)  # type: ignore[misc]

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The Trainer's, after restoring the weighting's state from the checkpoint, if any."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)  # type: ignore[attr-defined]
        if folder and isinstance(self.weighting, nn.Module) and self.weighting.state_dict():
            path = Path(str(folder)) / STATE_NAME
            if not path.is_file():
                raise ValueError(
                    f"Found no {STATE_NAME} in {folder}, whose training is to go on with a "
                    f"{type(self.weighting).__name__}; expected a checkpoint of a "
                    "JacobianDescentMixin. Train without resume_from_checkpoint, from its model."
                )
            self.weighting.load_state_dict(torch.load(path, "cpu", weights_only=True))
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _engine_on(self, model: nn.Module) -> Engine:
        """The engine, made before the first forward of the model as it is wrapped now."""
        if self._jd_engine is None or self._jd_model is not model:
            self._jd_engine = None  # its hooks go first
            self._jd_engine, self._jd_model = Engine(model, **self._jd_options), model
        return self._jd_engine


class JacobianDescentTrainer(JacobianDescentMixin, Trainer):
    """A Trainer that takes steps of Jacobian descent, by default on each sample's cross-entropy."""


class _SavesWeighting(TrainerCallback):
    """Writes the weighting's state into each checkpoint."""

    def __init__(self, weighting: Weigher) -> None:
        self._weighting = weighting

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if isinstance(self._weighting, nn.Module) and args.should_save:
            assert args.output_dir is not None
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self._weighting.state_dict(), folder / STATE_NAME)
