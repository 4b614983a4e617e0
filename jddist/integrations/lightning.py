"""Lightning 2: Jacobian descent by manual optimization, whatever the strategy.

The callback makes the engine when the strategy has wrapped the model, takes the steps, and keeps
the weighting's state in checkpoints::

    class Model(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            ...

        def training_step(self, batch, index):
            losses = ...  # [b]: one objective per sample
            optimizer = self.optimizers()
            optimizer.zero_grad()
            backward(self, losses)
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()

    Trainer(strategy="ddp", callbacks=[JacobianDescent(UPGradWeighting(), batch_dim=0)])
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import Placement
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from jddist.autogram import Engine
from jddist.autogram.step import Weigher
from jddist.distribution.counts import Count
from jddist.errors import UnsupportedModelError

from ._extra import require

require("lightning", "lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402  (told first)


class JacobianDescent(Callback):
    """Gives a LightningModule with manual optimization an engine.

    It works with ``ddp`` and its variants (a static graph too), ModelParallelStrategy with
    ``fully_shard`` in ``configure_model``, one device, and mixed precision. A backward that
    Lightning did not begin is refused under DDP, which would not synchronise its gradients, since
    Lightning calls ``training_step`` within DDP's forward.

    Args:
        weighting: Maps the Gramian of the losses to weights; a stateful one is saved and restored
            with Lightning's checkpoints.
        batch_dim: The dimension of the samples in the losses; None if they are tasks.
        objectives: Where the objectives live; see ``Engine``.
        **options: Further arguments of ``Engine``.

    Attributes:
        engine: The engine, while the model is being fitted.
        weighting: The weighting.
    """

    def __init__(
        self,
        weighting: Weigher,
        *,
        batch_dim: int | None,
        objectives: Placement | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.weighting = weighting
        self.engine: Engine | None = None
        self._options = {"batch_dim": batch_dim, "objectives": objectives, **options}
        self._guards: list[RemovableHandle] = []
        self._expected = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the engine, from the model as the strategy wrapped it.

        Raises:
            UnsupportedModelError: Lightning is to optimize by itself, or the strategy is none of
                those that are supported.
        """
        if pl_module.automatic_optimization:
            raise UnsupportedModelError(
                f"Found {type(pl_module).__name__} with automatic optimization, which takes one "
                "scalar loss; expected manual optimization. Set self.automatic_optimization = "
                "False in its __init__, and call jddist.integrations.lightning.backward(self, "
                "losses) in training_step."
            )
        model = trainer.strategy.model
        assert model is not None
        self.engine = Engine(model, **self._options)
        if isinstance(model, DistributedDataParallel):
            trained = [p for p in pl_module.parameters() if p.requires_grad]
            self._guards = [
                p.register_post_accumulate_grad_hook(self._refuse_unseen) for p in trained
            ]

    def backward(
        self,
        module: LightningModule,
        losses: Tensor,
        weighting_or_weights: Weigher | Tensor | None = None,
        /,
        *,
        count: Count | None = None,
    ) -> Tensor:
        """See :func:`backward`."""
        if self.engine is None:
            raise RuntimeError(
                "Found a backward before fitting has started; expected one in training_step. "
                "Call trainer.fit(model)."
            )
        scaler: Any = getattr(module.trainer.precision_plugin, "scaler", None)
        scaled = scaler is not None and scaler.is_enabled()
        return self.engine.backward(
            scaler.scale(losses) if scaled else losses,
            self.weighting if weighting_or_weights is None else weighting_or_weights,
            count=count,
            scale=scaler.get_scale() if scaled else None,
            # It scales, and tells DDP that a backward is coming, by itself.
            backward=lambda _, weights: module.manual_backward(losses, gradient=weights),
        )

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Notes that Lightning begins a backward."""
        self._expected = True

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that Lightning has ended a backward."""
        self._expected = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forgets a backward that failed."""
        self._expected = False

    def _refuse_unseen(self, parameter: Tensor) -> None:
        if not self._expected:
            parameter.grad = None
            raise RuntimeError(
                "Found a backward that Lightning did not begin, as by losses.backward() in "
                "training_step; expected manual_backward, without which DDP leaves every rank "
                "with its own gradients. Call jddist.integrations.lightning.backward(self, "
                "losses)."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the model."""
        self.engine = None
        for guard in self._guards:
            guard.remove()
        self._guards = []

    def state_dict(self) -> dict[str, Any]:
        """The weighting's state, for Lightning's checkpoints."""
        return self.weighting.state_dict() if isinstance(self.weighting, nn.Module) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the weighting's state."""
        if isinstance(self.weighting, nn.Module):
            self.weighting.load_state_dict(state_dict)


def backward(
    module: LightningModule,
    losses: Tensor,
    weighting_or_weights: Weigher | Tensor | None = None,
    /,
    *,
    count: Count | None = None,
) -> Tensor:
    """A whole step of Jacobian descent within ``training_step``, by Lightning's manual backward.

    To accumulate, call it for every micro-batch and step the optimizer now and then: gradients add
    up, each micro-batch with weights of its own (divide the losses for the mean). A closure is not
    needed. Clip with ``self.clip_gradients``.

    Args:
        module: The LightningModule, whose Trainer has a JacobianDescent callback.
        losses: This rank's objectives, with their graph, of any shape. Not their mean.
        weighting_or_weights: Other than the callback's weighting: one, or the global weights.
        count: With task-wise objectives, the number of samples that these are means over; see
            ``Engine.compute_gramian``.

    Returns:
        The weights of all objectives of all ranks.

    Raises:
        RuntimeError: The Trainer does not have exactly one such callback.
        The errors of ``Engine.backward``.
    """
    callbacks: list[Any] = module.trainer.callbacks  # type: ignore[attr-defined]
    found = [callback for callback in callbacks if isinstance(callback, JacobianDescent)]
    if len(found) != 1:
        raise RuntimeError(
            f"Found {len(found)} JacobianDescent callbacks in the Trainer; expected one, or to be "
            "told which. Pass Trainer(callbacks=[JacobianDescent(weighting, batch_dim=0)]), or "
            "call the callback's own backward(module, losses)."
        )
    return found[0].backward(module, losses, weighting_or_weights, count=count)
