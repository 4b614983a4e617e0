"""Which ranks have what in common, read off the meshes on which a model's parameters lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from jddist.errors import UnsupportedModelError

from .collectives import Group
from .grid import Grid

Named = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks of a sharded model.

    Attributes:
        everyone: All of them.
        objectives: Those over which the objectives are spread.
        columns: Those over which the columns of a row are cut.
        tensor: Those that have the same objectives and run one graph together; None without tensor
            parallelism.
    """

    everyone: Group
    objectives: Group
    columns: Grid
    tensor: Group | None = None


def ranks_of_tensor_parallel(parameters: Named) -> Ranks:
    """The ranks of a model with ``parallelize_module`` alone.

    Raises:
        UnsupportedModelError: They are not all ranks that run, on one mesh of one dimension.
    """
    meshes: dict[DeviceMesh, str] = {}
    for name, parameter in parameters:
        if not isinstance(parameter, DTensor):
            continue
        mesh = parameter.device_mesh
        if mesh.ndim != 1 or any(p.is_partial() for p in parameter.placements):
            raise _unsupported(
                name,
                parameter,
                "a mesh of one dimension, or two of which fully_shard cuts over the first. Call "
                'fully_shard(..., mesh=mesh["dp"]) on the modules after parallelize_module',
            )
        meshes.setdefault(mesh, name)
    if len(meshes) != 1:
        raise UnsupportedModelError(
            f"Found parameters on {len(meshes)} meshes ({_listed(meshes)}); expected one mesh for "
            "tensor parallelism. Pass the same mesh to every parallelize_module."
        )
    (mesh,) = meshes
    _check_order(mesh)
    if mesh.size() != dist.get_world_size():
        raise UnsupportedModelError(
            f"Found tensor parallelism over {mesh.size()} of {dist.get_world_size()} ranks, and no "
            "wrapper for the others; expected to know what the ranks have to do with each other. "
            'Call fully_shard(..., mesh=mesh["dp"]) on the modules after '
            'parallelize_module(model, mesh["tp"], ...).'
        )
    group = Group(mesh.get_group())
    return Ranks(group, Group(None), Grid(group, (group,)), group)


def ranks_of_fully_shard(parameters: Named) -> Ranks:
    """The ranks of a model in ``fully_shard``, after ``parallelize_module`` or not.

    Raises:
        UnsupportedModelError: Parameters are sharded in a way that is not supported.
    """
    meshes: dict[DeviceMesh, str] = {}
    hybrid: dict[DeviceMesh, str] = {}
    tensor: dict[DeviceMesh, str] = {}
    for name, parameter in parameters:
        if not isinstance(parameter, DTensor):
            continue
        # A strided shard is a type of its own, of which some versions say that it is a Shard.
        kinds = [type(placement) for placement in parameter.placements]
        if kinds == [Shard]:
            kind = meshes
        elif kinds == [Replicate, Shard]:
            kind = hybrid
        elif len(kinds) == 2 and not any(
            (i == 0 and p.is_replicate()) or p.is_partial()
            for i, p in enumerate(parameter.placements)
        ):
            kind = tensor
        else:
            raise _unsupported(
                name,
                parameter,
                "(Shard,), (Replicate, Shard) for hybrid sharding, or on two dimensions the one "
                "of fully_shard and that of tensor parallelism. Call fully_shard on every module "
                "that parallelize_module was called on, on a mesh of two dimensions",
            )
        kind.setdefault(parameter.device_mesh, name)
    if tensor and not hybrid:
        return _of_two_dimensions(meshes, tensor)
    found = {**meshes, **hybrid, **tensor}
    if len(found) != 1:
        raise UnsupportedModelError(
            f"Found parameters sharded over {len(found)} meshes ({_listed(found)}); expected one "
            "mesh for the whole model. Pass the same mesh to every fully_shard."
        )
    (mesh,) = found
    _check_order(mesh)
    if mesh.ndim == 1:
        group = Group(mesh.get_group())
        return Ranks(group, group, Grid(group, (group,)))
    everyone = _world(mesh, "hybrid sharding")
    columns = Group(mesh.get_group(1))
    return Ranks(everyone, everyone, Grid(columns, (columns,)))


def _of_two_dimensions(meshes: dict[DeviceMesh, str], tensor: dict[DeviceMesh, str]) -> Ranks:
    square = next(iter(tensor))
    ranks = dist.get_process_group_ranks(square.get_group(0))
    others = [m for m in meshes if dist.get_process_group_ranks(m.get_group()) != ranks]
    if others or len(tensor) != 1:
        raise UnsupportedModelError(
            f"Found parameters sharded over several meshes ({_listed({**tensor, **meshes})}); "
            "expected one mesh of two dimensions, of which fully_shard gets the first everywhere. "
            'Call fully_shard(..., mesh=mesh["dp"]) on the whole model after '
            'parallelize_module(model, mesh["tp"], ...).'
        )
    _check_order(square)
    everyone = _world(square, "fully_shard with tensor parallelism")
    data, lockstep = Group(square.get_group(0)), Group(square.get_group(1))
    return Ranks(everyone, data, Grid(everyone, (data, lockstep)), lockstep)


def _world(mesh: DeviceMesh, what: str) -> Group:
    """All ranks that run, which have to be those of the mesh."""
    ranks = mesh.mesh.flatten().tolist()
    if ranks != list(range(dist.get_world_size())):
        raise UnsupportedModelError(
            f"Found {what} over the ranks {ranks} of {dist.get_world_size()}; expected "
            "all ranks in order. Use a mesh of one dimension, or one of all ranks."
        )
    return Group(dist.group.WORLD)


def _check_order(mesh: DeviceMesh) -> None:
    """Which rank holds which shard is told from its place in the group."""
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise UnsupportedModelError(
            f"Found a mesh of the ranks {ranks}; expected ascending ranks. Use init_device_mesh."
        )


def _unsupported(name: str, parameter: DTensor, expected: str) -> UnsupportedModelError:
    mesh = parameter.device_mesh
    return UnsupportedModelError(
        f"Found the parameter '{name}' placed as {parameter.placements} on a mesh of {mesh.ndim} "
        f"dimensions ({mesh.mesh_dim_names}); expected {expected}."
    )


def _listed(meshes: dict[DeviceMesh, str]) -> str:
    return ", ".join(
        f"that of '{name}' {tuple(mesh.shape)} {mesh.mesh_dim_names}"
        for mesh, name in meshes.items()
    )
