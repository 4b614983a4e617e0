"""Models in ``fully_shard`` for the multi-rank tests, and the brute-force references for them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from jddist.distribution.unsharding import _param_groups
from tests._oracle import jacobian
from tests.distributed._training import FEATURES, TASKS, flatten


class Tied(nn.Module):
    """Layers with fewer rows than there are ranks, a frozen one, and weights used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(FEATURES, 5)
        self.first = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(3)
        self.narrow = nn.Linear(3, 2)
        self.wide = nn.Linear(2, 3)
        self.last = nn.Linear(3, TASKS, bias=False)
        self.again = nn.Linear(3, TASKS, bias=False)
        self.again.weight = self.last.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(torch.tanh(self.frozen(x)))))
        hidden = hidden + torch.tanh(self.wide(torch.tanh(self.narrow(hidden))))
        return self.last(hidden) + torch.tanh(self.again(hidden * hidden))


def make_tied() -> Tied:
    torch.manual_seed(3)
    return Tied().double()


def make_mesh(replicas: int = 1) -> DeviceMesh:
    """A mesh of all ranks; of two dimensions if there are replicas (hybrid sharding)."""
    size = dist.get_world_size()
    if replicas == 1:
        return init_device_mesh("cpu", (size,))
    return init_device_mesh(
        "cpu", (replicas, size // replicas), mesh_dim_names=("replicate", "shard")
    )


def shard(
    model: nn.Module,
    children: list[nn.Module] | None = None,
    *,
    mesh: DeviceMesh,
    root: bool = True,
    reshard: bool | None = None,
) -> nn.Module:
    """Applies ``fully_shard`` to the children and the model."""
    for child in model.children() if children is None else children:
        fully_shard(child, mesh=mesh, reshard_after_forward=reshard)
    if root:
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_parameters(model: nn.Module) -> Tensor:
    return flatten([whole(p) for p in model.parameters()])


def whole_gradients(model: nn.Module, *, placed: bool = True) -> Tensor:
    """The gradients, which have to lie as their parameters do."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        assert p.grad is not None
        assert type(p.grad) is type(p.data) or not isinstance(p, DTensor)
        if isinstance(p, DTensor):
            assert isinstance(p.grad, DTensor)
            assert not placed or p.grad.placements == p.placements
    return flatten([whole(p.grad) for p in trained])


def whole_modules(model: nn.Module) -> int:
    """How many sharded modules hold whole parameters now."""
    sharded = (module for module in model.modules() if isinstance(module, FSDPModule))
    return sum(group.is_unsharded for group in _param_groups(sharded))


def rows_of(losses: Tensor, model: nn.Module) -> Tensor:
    return jacobian(losses, list(model.parameters()))


def assign(model: nn.Module, vector: Tensor) -> None:
    """Writes a gradient of all trainable parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = vector.split([p.numel() for p in trained])
    for p, part in zip(trained, parts, strict=True):
        p.grad = part.view_as(p).clone()
