"""``fully_shard`` (FSDP2): parameters and the batch are both sharded.

On a mesh of two dimensions (hybrid sharding) the batch is spread over all ranks, and every replica
cuts the parameters alike: what is summed over columns is summed within a replica. After
``parallelize_module`` the batch is spread over the first dimension alone, and the ranks along the
second run one graph in lockstep.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement
from torch.nn.parameter import Parameter

from jddist.autogram.capture import paused

from .beside import reduced_together
from .meeting import Forwards
from .mesh import ranks_of_fully_shard
from .row_passes import RowPass, reduced_rows
from .sharded import ShardedColumns, outermost
from .unsharding import Unsharding


class FullyShard(ShardedColumns):
    """Parameters that ``fully_shard`` cuts into shards, one on each rank.

    Args:
        roots: The models, of which some modules or all are sharded.
        objectives: The placement of autojac's rows, or None.

    Raises:
        UnsupportedModelError: The shards are spread in a way that is not supported.
    """

    reduces_every_backward = True

    def __init__(self, roots: Sequence[nn.Module], objectives: Placement | None) -> None:
        roots = outermost(roots)
        self._unsharding = Unsharding(roots)
        self.put_back()
        named = [entry for root in roots for entry in root.named_parameters()]
        super().__init__(roots, objectives, ranks_of_fully_shard(named))

    @property
    def reduces(self) -> bool:
        """Whether the next backward reduces gradients over ranks."""
        return self._unsharding.reduces()

    def put_back(self) -> None:
        """After a forward, modules may hold whole parameters."""
        self._unsharding.reshard()

    def is_own(self, parameter: Tensor) -> bool:
        return isinstance(parameter, DTensor)

    @property
    def reduces_others(self) -> bool:
        """Not in lockstep, where a gradient is a sum over ranks or not, as its layer has it."""
        return not self.lockstep.active

    def weighted_backward(self, output: Tensor, weights: Tensor, *, retain_graph: bool) -> None:
        """Parameters that are not sharded get what the wrapper would have made of them."""
        others = [p for p in self.names if p.requires_grad and not self.is_own(p)]
        with reduced_together(others, self.group, self._divide_factor()):
            super().weighted_backward(output, weights, retain_graph=retain_graph)

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
            with self.group.naming(), paused():
                return reduced_rows(
                    passes,
                    self.leaves(),
                    self.group,
                    divisor,
                    retain_graph=retain_graph,
                    summed=summed,
                    not_last=self._unsharding.kept if keeps else nullcontext,
                    order=list(self.names),
                )
        except BaseException:
            self._unsharding.drop_failed_passes()
            raise
        finally:
            if keeps:  # whatever the last pass did not reach
                self._unsharding.reshard_after_passes()

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Every rank has to enter: all parameters are gathered, once, before anything else."""
        # A rank that is in another call would otherwise take part in the wrong collective.
        self.handshake("a pass over sharded parameters", {}, {})
        with self.group.naming(), self._unsharding.whole():
            yield

    def forwards(self, call: str) -> Forwards:
        """Forwards of the sharded modules, before which the ranks may meet."""
        modules = [m for m in self._unsharding.modules if isinstance(m, nn.Module)]
        return Forwards(modules, lambda: self.handshake(call, {}, {}))

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
