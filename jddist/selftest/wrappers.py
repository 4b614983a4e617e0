"""The ways in which a model is spread over ranks, as the checks see them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

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
        dtype: Of the parameters.
        tolerance: How far training may be off one process in float64.
    """

    dtype = torch.float64
    # The project's bound in float64; what is expected is about 1e-15.
    tolerance = 1e-10

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


class _DeepSpeed(Wrapper):
    """ZeRO stage 3, which partitions the parameters; it keeps float32 weights at best."""

    dtype = torch.float32
    tolerance = 1e-5

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks)
        for package in ("deepspeed", "jddist.integrations.deepspeed"):
            if not _exists(package):
                self.unavailable = f"found no {package}"

    def wrap(self, network: nn.Module, rate: float) -> None:
        logging.disable(logging.WARNING)  # of DeepSpeed, which says something at every step
        deepspeed: Any = importlib.import_module("deepspeed")
        # It would be compiled on first use, which may take longer than a check may.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = self.ranks.backend
        os.environ.setdefault("LOCAL_RANK", "0")  # it reads it even in one process
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": rate}},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        }
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=network, model_parameters=list(network.parameters()), config=config
        )
        self.model = self._engine

    def update(self) -> None:
        self._engine.step()

    def parameters(self) -> list[Tensor]:
        deepspeed: Any = importlib.import_module("deepspeed")
        partitioned = list(self._engine.module.parameters())
        with deepspeed.zero.GatheredParameters(partitioned):
            return [p.detach().clone() for p in partitioned]


def _exists(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # what it is part of is not there either
        return False


WRAPPERS: dict[str, Callable[[Ranks], Wrapper]] = {
    "ddp": _Ddp,
    "fully_shard": _FullyShard,
    "deepspeed": _DeepSpeed,
}
DEFAULT = ("ddp", "fully_shard")
