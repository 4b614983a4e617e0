"""What jddist needs to know of ``fully_shard``'s internals: the only place that looks at them.

The wrapper's public functions set how it reduces and reshards, but none says how it does now, and
none says which tensor stands for a parameter in the autograd graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parameter import Parameter


class Unsharding:
    """The sharded modules of a model, in the modules' order, which is the same on every rank.

    Args:
        roots: The models.

    Raises:
        RuntimeError: This version of torch keeps its parameters in another way.
    """

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        found = dict.fromkeys(m for root in roots for m in root.modules())
        # Weak: whoever holds this object must not keep models alive.
        self._refs = [weakref.ref(m) for m in found if isinstance(m, FSDPModule)]
        _param_groups(self._modules)

    @property
    def modules(self) -> list[FSDPModule]:
        """The sharded modules that are still alive."""
        return self._modules

    @property
    def _modules(self) -> list[FSDPModule]:
        alive = [ref() for ref in self._refs]
        return [module for module in alive if module is not None]

    @property
    def _groups(self) -> list[Any]:
        return _param_groups(self._modules)

    def reshard(self) -> None:
        """Puts the sharded parameters back into their modules."""
        for module in self._modules:
            module.reshard()

    def leaves(self) -> dict[Parameter, Tensor]:
        """For each sharded parameter the one that modules compute with, once there is one."""
        return {
            p.sharded_param: p._unsharded_param
            for p in self._params()
            if hasattr(p, "_unsharded_param")
        }

    def stand_ins(self) -> dict[Tensor, Parameter]:
        """What modules may hold in place of a parameter, with that parameter."""
        names = ("_unsharded_param", "_sharded_post_forward_param")
        return {
            getattr(p, name): p.sharded_param
            for p in self._params()
            for name in names
            if getattr(p, name, None) is not None
        }

    def divide_factors(self) -> set[float | None]:
        """The divisors of gradients that were set; None where it is the number of ranks."""
        return {group.gradient_divide_factor for group in self._groups}

    def has_reduce_hook(self) -> bool:
        """Whether something else is done to gradients after they were reduced."""
        return any(getattr(group, "_all_reduce_hook", None) is not None for group in self._groups)

    def reduces(self) -> bool:
        """Whether the next backward reduces gradients over ranks."""
        return all(group.reduce_grads and group.all_reduce_grads for group in self._groups)

    def has_accumulated(self) -> bool:
        """Whether gradients of earlier backwards wait for their reduction."""
        return any(
            getattr(getattr(p, "_unsharded_param", None), "grad", None) is not None
            or p.unsharded_accumulated_grad is not None
            for p in self._params()
        ) or any(group._partial_reduce_output is not None for group in self._groups)

    def reduce_accumulated(self) -> None:
        """Reduces what waits, as the end of a backward does."""
        for module in self._modules:
            state: Any = module._get_fsdp_state()
            state._root_post_backward_final_callback()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, all parameters are unsharded and backward passes communicate nothing.

        Then it does not matter that ranks take different numbers of passes (one has no samples,
        another checks its rows): whoever skips one would shift the pairing of all collectives.
        """
        sharded = [m for m in self._modules if _is_sharded(m)]
        names = ("reduce_grads", "reshard_after_backward", "post_forward_mesh_info")
        before = [(group, {n: getattr(group, n) for n in names}) for group in self._groups]
        prefetches = self._prefetches()
        for module in self._modules:
            module.unshard()
        try:
            for group in self._groups:
                group.reduce_grads = group.reshard_after_backward = False
                group.post_forward_mesh_info = None  # a forward that is repeated reshards nothing
            yield
        finally:
            for group, values in before:
                for name, value in values.items():
                    setattr(group, name, value)
            self.end_failed_passes()
            for listed, contents in prefetches:
                listed[:] = contents
            for module in sharded:
                module.reshard()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, backward passes leave the parameters whole that they gather."""
        before = [(group, group.reshard_after_backward) for group in self._groups]
        try:
            for group, _ in before:
                group.reshard_after_backward = False
            yield
        finally:
            for group, reshard_after_backward in before:
                group.reshard_after_backward = reshard_after_backward

    def reshard_after_passes(self) -> None:
        """What the end of an ordinary backward does about parameters that are still whole."""
        for group in self._groups:
            if group.reshard_after_backward:
                group.reshard()

    def _prefetches(self) -> list[tuple[list[Any], list[Any]]]:
        """The lists by which a backward gathers parameters ahead, with their contents.

        Every pass uses them up. The order of collectives in the next one then depends on whether
        this rank took a pass.
        """
        states: list[Any] = [module._get_fsdp_state() for module in self._modules]
        lists = [group._post_forward_indices for group in self._groups]
        orders = {id(order): order for s in states if (order := s._comm_ctx.post_forward_order)}
        return [(listed, list(listed)) for listed in [*lists, *orders.values()]]

    def end_failed_passes(self) -> None:
        """A pass that raised has not run the callback at its end, and no later one would queue it:
        the gradients of some modules would then never be reduced."""
        for module in self._modules:
            state: Any = module._get_fsdp_state()
            if state._state_ctx.post_backward_final_callback_queued:
                state._root_post_backward_final_callback()

    def drop_failed_passes(self) -> None:
        """Ends a pass that raised. What it left is thrown away and not reduced: the other ranks
        may have got further, or not so far."""
        before = [(group, group.reduce_grads) for group in self._groups]
        try:
            for group, _ in before:
                group.reduce_grads = False
            self.end_failed_passes()
        finally:
            for group, reduce_grads in before:
                group.reduce_grads = reduce_grads
        for parameter in self._params():
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None
            parameter.unsharded_accumulated_grad = None

    def _params(self) -> Iterator[Any]:
        for group in self._groups:
            yield from group.fsdp_params


def _is_sharded(module: FSDPModule) -> bool:
    return all(not group.is_unsharded for group in _param_groups([module]))


def _param_groups(modules: Iterable[FSDPModule]) -> list[Any]:
    groups: dict[Any, None] = {}
    for module in modules:
        state: Any = module._get_fsdp_state()
        if hasattr(state, "_fsdp_param_groups"):
            found = list(state._fsdp_param_groups)
        elif hasattr(state, "_fsdp_param_group"):  # before torch 2.13
            found = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
        else:
            found = None
        needed = (
            "fsdp_params",
            "reduce_grads",
            "reshard_after_backward",
            "post_forward_mesh_info",
            "is_unsharded",
        )
        if found is None or any(not hasattr(g, name) for g in found for name in needed):
            raise RuntimeError(
                "Found a fully_shard whose state does not have the attributes that jddist needs; "
                "expected torch 2.11 to 2.13."
            )
        groups.update(dict.fromkeys(found))
    return list(groups)
