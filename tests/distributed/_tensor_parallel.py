"""Models on tensor-parallel layers for the multi-rank tests: a plan for each."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from tests.distributed._conformance import Setup
from tests.distributed._every_method import Many, Small
from tests.distributed._sharded import Tied
from tests.distributed._training import Network
from tests.distributed.test_task_invariance import MultiTask


class Replicated(ParallelStyle):
    """Parameters that all ranks hold alike, as DTensors: torch clips no others together."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def before(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            return (DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False),)

        def after(_: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
            local: Tensor = output.to_local()
            return local

        return distribute_module(module, device_mesh, None, before, after)


def columns() -> ColwiseParallel:
    """Whole inputs and outputs: the sizes need not divide."""
    return ColwiseParallel(output_layouts=Replicate())


def rows() -> RowwiseParallel:
    """Whole inputs and outputs: the sizes need not divide."""
    return RowwiseParallel(input_layouts=Replicate())


def plan_of(model: nn.Module, size: int) -> dict[str, ParallelStyle]:
    """How each module of one of the tests' models is parallelized over ``size`` ranks."""
    if isinstance(model, Network):
        return {"first": columns(), "norm": Replicated(), "twice": rows(), "last": columns()}
    if isinstance(model, Small):
        return {"first": columns(), "last": rows()}
    if isinstance(model, Many):
        of_each = [plan_of(small, size) for small in model.children()]
        return {f"of{i}.{name}": s for i, plan in enumerate(of_each) for name, s in plan.items()}
    if isinstance(model, Tied):
        # Of less than a line for each rank, torch's own backward leaves gradients where no
        # optimizer takes them.
        narrow: ParallelStyle = rows() if size == 3 else Replicated()
        wide: ParallelStyle = columns() if size == 3 else Replicated()
        if size == 2:  # between them only a part of the activations is on each rank
            narrow, wide = ColwiseParallel(use_local_output=False), RowwiseParallel()
        return {
            "frozen": columns(),
            "first": rows(),
            "norm": Replicated(),
            "narrow": narrow,
            "wide": wide,
            "last": columns(),
            "again": columns(),
        }
    raise NotImplementedError(type(model).__name__)


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Applies the model's plan, and ties again what was tied."""
    parallelize_module(model, mesh, plan_of(model, mesh.size()))
    if isinstance(model, Tied):
        model.again.weight = model.last.weight
    return model


class TensorParallelSetup(Setup):
    """All ranks have the whole batch."""

    places_gradients = False  # torch leaves some replicated, or yet to be summed

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(0, 1, "even")
        self.mesh = init_device_mesh("cpu", (world_size,))

    def place(self, model: nn.Module, *, reshard: bool | None = None) -> nn.Module:
        return parallelize(model, self.mesh)

    def place_tasks(self, model: MultiTask, *, heads: bool) -> nn.Module:
        parallelize(model.trunk, self.mesh)
        if heads:
            place_heads(model, self.mesh)
        return model


class TwoDimensionalSetup(Setup):
    """``fully_shard`` over one dimension of a mesh, tensor parallelism over the other."""

    divide_factors = (None, 3.0)

    def __init__(self, rank: int, world_size: int, kind: str, replicas: int) -> None:
        self.mesh = init_device_mesh(
            "cpu", (replicas, world_size // replicas), mesh_dim_names=("dp", "tp")
        )
        super().__init__(self.mesh["dp"].get_local_rank(), replicas, kind)
        # torch warns of what others may do in place to what its own styles return.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

    def place(self, model: nn.Module, *, reshard: bool | None = None) -> nn.Module:
        parallelize(model, self.mesh["tp"])
        for name, module in model.named_children():
            if name not in ("last", "again"):
                fully_shard(module, mesh=self.mesh["dp"], reshard_after_forward=reshard)
        return fully_shard(model, mesh=self.mesh["dp"], reshard_after_forward=reshard)

    def place_tasks(self, model: MultiTask, *, heads: bool) -> nn.Module:
        self.place(model.trunk, reshard=True)
        if not heads:
            return model
        place_heads(model, self.mesh["tp"])
        return fully_shard(model, mesh=self.mesh["dp"])

    def sync(self, model: nn.Module, on: bool) -> None:
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(on)

    def divide_by(self, model: nn.Module, factor: float) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(factor)


def place_heads(model: MultiTask, mesh: DeviceMesh) -> None:
    """Parallelizes heads of a single line each."""
    for i, head in enumerate(model.heads):
        parallelize_module(head, mesh, (rows(), Replicated())[i % 2])
