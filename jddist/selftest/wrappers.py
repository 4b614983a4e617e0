"""The ways in which a model is spread over ranks, as the checks see them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from .ranks import Ranks


class Wrapper:
    """A wrapped model and its plain gradient descent.

    Args:
        ranks: This rank.

    Attributes:
        model: The wrapped model, once ``wrap`` was called.
        unavailable: Why this wrapper cannot be used here, if so; the same on every rank.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.model: nn.Module = nn.Identity()
        self.unavailable = ""

    def wrap(self, network: nn.Module, rate: float) -> None:
        """Wraps a network; it is trained by gradient descent with a learning rate."""
        self.model = self.wrapped(network)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=rate)

    def wrapped(self, network: nn.Module) -> nn.Module:
        """The network in the wrapper."""
        raise NotImplementedError

    def update(self) -> None:
        """Steps the optimizer and clears the gradients."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def parameters(self) -> list[Tensor]:
        """The parameters, DTensors where they are sharded."""
        return list(self.model.parameters())


class _Ddp(Wrapper):
    def wrapped(self, network: nn.Module) -> nn.Module:
        return DistributedDataParallel(network)


class _FullyShard(Wrapper):
    def wrapped(self, network: nn.Module) -> nn.Module:
        mesh = init_device_mesh(self.ranks.device.type, (self.ranks.size,))
        for child in network.children():
            fully_shard(child, mesh=mesh)
        fully_shard(network, mesh=mesh)
        return network


WRAPPERS: dict[str, Callable[[Ranks], Wrapper]] = {"ddp": _Ddp, "fully_shard": _FullyShard}
