"""Methods that look at the values of the losses besides their gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NeedsLosses(nn.Module):
    """Mixin of methods that are told the losses before every call, by `set_losses`.

    A value serves one call. Over several ranks all of them have to give the same, global losses;
    those of rank 0 count.
    """

    _losses: Tensor | None = None

    def set_losses(self, losses: Tensor) -> None:
        """States the losses whose Jacobian the next call gets.

        Args:
            losses: Vector [m], in the order of the rows. Over several ranks the global values, the
                same everywhere: average local ones first.

        Raises:
            ValueError: It is not a vector of finite numbers >= 0.
        """
        if losses.ndim != 1:
            raise ValueError(
                "`losses` must be a vector with one value per objective. Found a tensor of shape "
                f"{tuple(losses.shape)}."
            )
        losses = losses.detach().clone()
        if not bool((losses.isfinite() & (losses >= 0)).all()):
            raise ValueError(
                f"{type(self).__name__} compares losses by their ratios, so they must be finite "
                f"and non-negative. Found {losses.tolist()}."
            )
        self._losses = losses

    def _take_losses(self, like: Tensor) -> Tensor:
        """The losses [m] of this call, as a tensor like the statistic; they serve once."""
        losses, m = self._losses, like.shape[0]
        self._losses = None
        if losses is None:
            raise ValueError(
                f"{type(self).__name__} needs the values of the losses. Call set_losses(losses) "
                "before every step."
            )
        if len(losses) != m:
            raise ValueError(
                f"Found {len(losses)} losses and {m} objectives; expected one each. Pass the "
                "vector that was differentiated to set_losses."
            )
        return losses.to(like)


def stated_losses(module: nn.Module) -> list[list[float]]:
    """What the module and its submodules have been told for the next call."""
    found = [part._losses for part in module.modules() if isinstance(part, NeedsLosses)]
    return [losses.to(torch.float64).tolist() for losses in found if losses is not None]
