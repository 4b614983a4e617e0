"""Modules with which a batched or a multi-rank Gramian cannot be exact, refused by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from jddist.errors import UnsupportedModelError


def check_modules(scope: Mapping[nn.Module, str], *, batched: bool, num_ranks: int) -> None:
    """Raises UnsupportedModelError if a module in scope mixes samples or changes state.

    Args:
        scope: The modules with their names.
        batched: Whether the engine has a batch dimension.
        num_ranks: The number of ranks over which the objectives are spread.
    """
    for module, name in scope.items():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise UnsupportedModelError(
                f"Found module '{name}' ({type(module).__name__}) with sparse=True; expected dense "
                "gradients, which are what the rows are made of. Use sparse=False."
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq:
            _check_scaled_by_frequency(module, name, num_ranks)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            _check_renormalised(module, name, num_ranks)
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            _check_batch_norm(module, name, batched, num_ranks)
        elif batched and isinstance(module, nn.RNNBase):
            raise UnsupportedModelError(
                f"Found module '{name}' ({type(module).__name__}) in an engine with a batch_dim; "
                "expected modules whose inputs and outputs all have the samples first (an RNN's "
                "hidden state has not). Use batch_dim=None."
            )
        elif (
            batched
            and isinstance(module, _InstanceNorm)
            and module.track_running_stats
            and module.training
        ):
            raise UnsupportedModelError(
                f"Found module '{name}' ({type(module).__name__}) with track_running_stats=True "
                "in training mode; expected a module without side effects, since its forward may "
                "run twice. Set track_running_stats=False, or use batch_dim=None."
            )


def _check_scaled_by_frequency(module: nn.Module, name: str, num_ranks: int) -> None:
    if num_ranks > 1:
        raise UnsupportedModelError(
            f"Found module '{name}' ({type(module).__name__}) with scale_grad_by_freq=True on "
            f"{num_ranks} ranks; expected gradients that do not depend on how the batch is split "
            "over the ranks. Use scale_grad_by_freq=False."
        )


def _check_renormalised(module: nn.Module, name: str, num_ranks: int) -> None:
    if num_ranks > 1:
        raise UnsupportedModelError(
            f"Found module '{name}' ({type(module).__name__}) with max_norm on {num_ranks} ranks; "
            "expected parameters that stay the same on all ranks, and each rank shortens the lines "
            "that it reads. Use max_norm=None and clip the lines after the optimizer's step."
        )


def _check_batch_norm(module: nn.Module, name: str, batched: bool, num_ranks: int) -> None:
    what, fix = "in training mode", "put it in eval mode"
    if not module.training:
        what = "with track_running_stats=False, which takes the batch's statistics in eval mode too"
        fix = "track its statistics"
    what = f"module '{name}' ({type(module).__name__}) {what}"
    if batched:
        raise UnsupportedModelError(
            f"Found {what}, in an engine with a batch_dim; expected modules that treat the samples "
            "independently, and this one normalises over the batch. Replace it by GroupNorm or "
            f"InstanceNorm, {fix}, or use batch_dim=None."
        )
    if num_ranks > 1:
        raise UnsupportedModelError(
            f"Found {what}, on {num_ranks} ranks; expected a module whose result does not depend "
            "on how the batch is split over the ranks. Replace it by GroupNorm or InstanceNorm, or "
            f"{fix}."
        )


def explained(error: Exception) -> Exception:
    """The error, or one that says how to avoid it."""
    if "donated buffers" not in str(error):
        return error
    refusal = UnsupportedModelError(
        "Found compiled code that gives its buffers away in the first backward pass; expected a "
        "graph that can be differentiated more than once. Set "
        "torch._functorch.config.donated_buffer = False before the model first runs."
    )
    refusal.__cause__ = error
    return refusal
