"""``fully_shard`` (FSDP2): parameters and the batch are both sharded.

On a mesh of two dimensions (hybrid sharding) the batch is spread over all ranks, and every replica
cuts the parameters alike: what is summed over columns is summed within a replica.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.nn.parameter import Parameter

from jddist.autogram.capture import paused
from jddist.errors import UnsupportedModelError

from .base import Distribution
from .collectives import Group
from .cut import new_rows, rows_like
from .row_passes import RowPass, reduced_rows
from .unsharding import Unsharding


class FullyShard(Distribution):
    """Parameters that ``fully_shard`` cuts into shards, one on each rank.

    Args:
        roots: The models, of which some modules or all are sharded.
        objectives: The placement of autojac's rows, or None.

    Raises:
        UnsupportedModelError: The shards are spread in a way that is not supported.
    """

    shards_columns = True

    def __init__(self, roots: Sequence[nn.Module], objectives: Placement | None) -> None:
        below = {child for root in roots for child in root.modules() if child is not root}
        roots = [root for root in dict.fromkeys(roots) if root not in below]
        self._roots = [weakref.ref(root) for root in roots]
        self._unsharding = Unsharding(roots)
        self._unsharding.reshard()  # after a forward, modules may hold whole parameters
        mesh = _only_mesh(roots)
        super().__init__(_all_ranks(mesh), objectives)
        if mesh.ndim > 1:
            self.column_group = Group(mesh.get_group(mesh.ndim - 1))
        for root in roots:
            self.register(root)

    @property
    def roots(self) -> list[nn.Module]:
        """The models that are still alive."""
        alive = [ref() for ref in self._roots]
        return [root for root in alive if root is not None]

    @property
    def reduces(self) -> bool:
        """Whether the next backward reduces gradients over ranks."""
        return self._unsharding.reduces()

    def is_own(self, parameter: Tensor) -> bool:
        return isinstance(parameter, DTensor)

    def leaves(self) -> dict[Parameter, Tensor]:
        return self._unsharding.leaves()

    def stand_ins(self) -> dict[Tensor, Parameter]:
        return self._unsharding.stand_ins()

    def check_takes_passes(self) -> None:
        """Raises ValueError unless rows can be told from gradients that wait for reduction."""
        if not self._unsharding.reduces() or self._unsharding.has_accumulated():
            raise ValueError(
                "Found a fully_shard that does not reduce gradients, or has yet to reduce those of "
                "earlier backwards; expected one that does, since rows of the Jacobian are reduced "
                "as they come. Call set_requires_gradient_sync(True): rows accumulate in .jac."
            )

    def rows(
        self,
        passes: Sequence[RowPass],
        *,
        retain_graph: bool,
        summed: Collection[Parameter] = (),
    ) -> tuple[dict[Parameter, Tensor], list[bool]]:
        """Rows by one backward pass each; every rank has to call. See ``reduced_rows``."""
        divisor = self._divide_factor()
        keeps = self.reshard == "speed"
        try:
            with paused():
                return reduced_rows(
                    passes,
                    self.leaves(),
                    self.group,
                    divisor,
                    retain_graph=retain_graph,
                    summed=summed,
                    not_last=self._unsharding.kept if keeps else nullcontext,
                )
        except BaseException:
            self._unsharding.drop_failed_passes()
            raise
        finally:
            if keeps:  # whatever the last pass did not reach
                self._unsharding.reshard_after_passes()

    def no_rows(self, parameter: Parameter) -> Tensor:
        """The Jacobian of nothing."""
        return rows_like(parameter, new_rows(parameter, 0))

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Every rank has to enter: all parameters are gathered, once, before anything else."""
        # A rank that is in another call would otherwise take part in the wrong collective.
        self.handshake("a pass over sharded parameters", {}, {})
        with self._unsharding.whole():
            yield

    def reduce_accumulated(self, parameters: Sequence[Parameter]) -> None:
        """What waits since backwards without gradient sync is reduced as by the next backward."""
        if self.reduces and self._unsharding.has_accumulated():
            self._unsharding.reduce_accumulated()

    def backward_factor(self, placement: Placement) -> float:
        """With ``set_gradient_divide_factor`` the wrapper's divisor is not the number of ranks."""
        return super().backward_factor(placement) / self.divisor * self._divide_factor()

    def _divide_factor(self) -> float:
        factors = self._unsharding.divide_factors()
        if len(factors) > 1:
            raise ValueError(
                f"Found modules with different gradient divide factors ({factors}); expected one. "
                "FSDPModule.set_gradient_divide_factor is not recursive: call it on every module "
                "that fully_shard was called on."
            )
        if self._unsharding.has_reduce_hook():
            raise ValueError(
                "Found an all-reduce hook on a module in fully_shard; expected none, since it may "
                "spread the objectives over more ranks than the mesh has. Remove it."
            )
        factor = factors.pop()
        if factor is not None and self.group.size == 1:
            raise ValueError(
                f"Found a gradient divide factor ({factor}) on one rank; expected none there, "
                "since torch divides by it once or twice depending on the dtype. Leave out "
                "FSDPModule.set_gradient_divide_factor."
            )
        return self.divisor if factor is None else factor


def _only_mesh(roots: Sequence[nn.Module]) -> DeviceMesh:
    """The mesh of all sharded parameters.

    Raises:
        UnsupportedModelError: There are several, or a parameter is not cut once, over the last
            dimension of the mesh.
    """
    meshes: dict[DeviceMesh, None] = {}
    for root in roots:
        for name, parameter in root.named_parameters():
            if not isinstance(parameter, DTensor):
                continue
            mesh, placements = parameter.device_mesh, parameter.placements
            # A strided shard is a type of its own, of which some versions say that it is a Shard.
            kinds = [type(placement) for placement in placements]
            if kinds not in ([Shard], [Replicate, Shard]):
                raise UnsupportedModelError(
                    f"Found the parameter '{name}' placed as {placements} on a mesh of "
                    f"{mesh.ndim} dimensions ({mesh.mesh_dim_names}); expected (Shard,), or "
                    "(Replicate, Shard) for hybrid sharding: tensor parallelism is not supported "
                    "yet. Use fully_shard alone."
                )
            meshes[mesh] = None
    if len(meshes) != 1:
        raise UnsupportedModelError(
            f"Found parameters sharded over {len(meshes)} meshes; expected one mesh for the whole "
            "model. Pass the same mesh to every fully_shard."
        )
    return next(iter(meshes))


def _all_ranks(mesh: DeviceMesh) -> Group:
    """All ranks of the mesh, over which the batch is spread.

    Raises:
        UnsupportedModelError: They are not all ranks that run, so that there is no group of them.
    """
    if mesh.ndim == 1:
        return Group(mesh.get_group())
    ranks = mesh.mesh.flatten().tolist()
    if ranks != list(range(dist.get_world_size())):
        raise UnsupportedModelError(
            f"Found hybrid sharding over the ranks {ranks} of {dist.get_world_size()}; expected "
            "all ranks in order. Use a mesh of one dimension, or one of all ranks."
        )
    return Group(dist.group.WORLD)
