"""Ranks that run one graph together, each with its shards of some tensors (tensor parallelism).

Their objectives are the same. Whatever one of them differentiates, the others have to at the same
time: the backward of a layer communicates, and so does what is decided in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.utils.weak import WeakIdKeyDictionary

from jddist.errors import LayoutMismatchError

from .collectives import Group
from .grid import Grid, Holding, is_cut_over, is_strided
from .whole import numel_of


class Lockstep:
    """The ranks with which this one runs in lockstep; by default it runs alone.

    Args:
        group: The ranks, or None if nothing is tensor-parallel.
        parameters: All parameters, in an order that is the same on every rank.
        agree: Tells all ranks of the model what this one is about to differentiate, or what error
            it ran into, and raises on every rank if that will not do.

    Attributes:
        active: Whether there are tensors that are sharded over the group.
        group: The ranks.
        stopped: Whether the last pass was called off on every rank.
    """

    def __init__(
        self,
        group: Group | None = None,
        parameters: Iterable[Tensor] = (),
        agree: Callable[[dict[str, Any], Exception | None], object] = lambda *_: None,
    ) -> None:
        self.active = group is not None
        self.group = group or Group(None)
        self.stopped = False
        self._agree = agree
        self._entered = False
        # What all ranks hold alike counts once: each rank answers for some of it.
        self._others: WeakIdKeyDictionary = WeakIdKeyDictionary()
        load = [0] * self.group.size
        for parameter in parameters:
            if not self.cuts(parameter):
                rank = load.index(min(load))
                load[rank] += parameter.numel()
                if rank != self.group.rank:
                    self._others[parameter] = rank

    def cuts(self, parameter: Tensor) -> bool:
        """Whether a parameter is sharded over the ranks."""
        return self.active and is_cut_over(parameter, self.group)

    def counts(self, parameter: Tensor) -> bool:
        """Whether this rank's columns of a parameter count: what all hold alike counts once."""
        return parameter not in self._others

    def numel(self, parameter: Tensor) -> int:
        """The number of a parameter's elements that this rank has in its graph."""
        if not self.cuts(parameter):
            return numel_of(parameter)
        low, high = Holding(parameter, Grid(self.group, (self.group,))).share(self.group.rank)
        return high - low

    @contextmanager
    def pass_ahead(self) -> Iterator[None]:
        """Around all that leads to a pass which begins with ``enter``: what fails before it is
        raised on every rank, since the others would wait for this one in the middle of a backward.
        """
        self._entered = self.stopped = False
        try:
            yield
        except Exception as error:
            if self.active and not self._entered:
                self._enter({}, error)
            raise

    def enter(self, info: dict[str, Any]) -> None:
        """Begins a pass; all ranks have to. It raises if they are not ready for the same one.

        Args:
            info: What ranks in lockstep have to differentiate alike.
        """
        if self.active and not self._entered:
            self._enter(info, None)

    def _enter(self, info: dict[str, Any], error: Exception | None) -> None:
        self._entered = self.stopped = True
        self._agree(info, error)
        self.stopped = False

    def union(self, flags: Sequence[bool]) -> list[bool]:
        """Which of some flags are set on any rank."""
        if self.group.size == 1:
            return list(flags)
        header = torch.tensor([int(flag) for flag in flags], dtype=torch.int64)
        return (self.group.gather_header(header) > 0).any(dim=0).tolist()

    def check_same(
        self, values: Mapping[str, Tensor], tolerance: float, floor: float = 0.0
    ) -> None:
        """Raises LayoutMismatchError on every rank if any of them has other values.

        Args:
            values: Numbers that follow from the same batch and the same parameters.
            tolerance: By how much they may differ, relative to the largest of each name.
            floor: By how much they may differ besides, relative to the largest of all: some
                gradients are zero but for rounding.
        """
        if self.group.size == 1 or not values:
            return
        parts = [value.detach().reshape(-1).double().cpu() for value in values.values()]
        header = torch.cat(parts).view(torch.int64)
        gathered = self.group.gather_header(header).view(torch.float64)
        largest = gathered.nan_to_num(0.0, 0.0, 0.0).abs().amax() if len(header) else 0.0
        wrong = [
            name
            for name, of_ranks in zip(
                values, gathered.split([len(part) for part in parts], dim=1), strict=True
            )
            if of_ranks.numel()
            and bool(of_ranks.isfinite().all())
            and float((of_ranks - of_ranks[0]).abs().max())
            > tolerance * float(of_ranks.abs().max()) + floor * float(largest)
        ]
        if wrong:
            listed = ", ".join(wrong[:8])
            raise LayoutMismatchError(
                f"Found values that differ between the {self.group.size} ranks of a "
                f"tensor-parallel group: {listed}; expected the same on each. Give all of them the "
                "same batch (a sampler for the data-parallel ranks alone), initial parameters and "
                "random numbers, and reduce the gradients of parameters that see a part of the "
                "activations only."
            )


def as_plain(tensor: Tensor) -> Tensor:
    """A DTensor that all ranks have alike as a plain tensor, with its graph; others as they are."""
    if isinstance(tensor, DTensor) and all(p.is_replicate() for p in tensor.placements):
        return tensor.to_local()
    return tensor


def check_plain(tensor: Tensor) -> Tensor:
    """Raises ValueError if objectives are spread over ranks, or yet to be reduced."""
    if isinstance(tensor, DTensor):
        raise ValueError(
            f"Found objectives in a DTensor placed as {tensor.placements}; expected Replicate(), "
            "or a plain tensor that all ranks have alike. Call .full_tensor() on them."
        )
    return tensor


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The mesh on which a DTensor lies; None for another tensor."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def on_mesh(tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """A plain tensor as a DTensor that all ranks of a mesh, if there is one, have alike."""
    if mesh is None:
        return tensor
    placements = [Replicate()] * mesh.ndim
    placed: Tensor = DTensor.from_local(tensor, mesh, placements, run_check=False)
    return placed


def part_like(tensor: Tensor, like: Tensor, *, rows: bool = False) -> Tensor:
    """This rank's part of a tensor that is placed as another, or is to be.

    Args:
        tensor: A tensor of any placement. Where it is another one all ranks have to call.
        like: A tensor.
        rows: Whether ``tensor`` has a dimension more, before the others.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    if not isinstance(like, DTensor):
        return settled(tensor.full_tensor())
    wanted = shifted(like) if rows else list(like.placements)
    return settled(tensor.redistribute(placements=wanted).to_local())


def shifted(tensor: DTensor) -> list[Placement]:
    """The placements of rows [m, *shape] of a sharded tensor."""
    return [p if p.is_replicate() else _moved(p) for p in tensor.placements]


def settled(tensor: Tensor) -> Tensor:
    """The tensor itself, once a collective under way has filled it."""
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor


def _moved(placement: Any) -> Placement:
    if is_strided(placement):
        moved: Placement = type(placement)(placement.dim + 1, split_factor=placement.split_factor)
        return moved
    return Shard(placement.dim + 1)
