"""How a model's parameters and objectives are spread over ranks: the seam under everything else.

The engine and autojac ask a Distribution for a handful of verbs and never see the wrapper. A
placement says in DTensor's words where the rows of the Jacobian live: ``Shard(0)``: every rank has
objectives of its own; ``Partial("avg")`` or ``Partial("sum")``: every rank has an estimate of the
same rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Placement, Shard
from torch.nn.parameter import Parameter
from torch.utils.weak import WeakIdKeyDictionary

from .collectives import Group
from .handshake import Handshake
from .once import Job, run_on_rank_zero

POSSIBLE_PLACEMENTS: tuple[Placement, ...] = (Shard(0), Partial("avg"), Partial("sum"))

# The distribution that each attached parameter belongs to.
_attached: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Distribution:
    """How some parameters are distributed over ranks.

    Args:
        group: The ranks over which the objectives are spread.
        objectives: The placement that was stated for autojac's rows, or None.

    Attributes:
        group: The ranks over which the objectives are spread.
        column_group: The ranks over which the columns of a row are sharded.
        objectives: The placement stated at ``attach``, or None if none was.
        names: The attached parameters with their names, in the model's order.
        divisor: The number by which the wrapper divides the sum of the ranks' gradients: the
            number of ranks over which it averages. Set it to 1 if you registered a communication
            hook that sums.
        shards_columns: Whether every rank holds a part of each parameter, and of each row.
    """

    shards_columns = False

    def __init__(self, group: Group, objectives: Placement | None) -> None:
        self.group = group
        self.objectives = None if objectives is None else check_placement(objectives)
        self.divisor: float = group.size
        # Weak: the table of attached parameters owns this object, and must not keep models alive.
        self.names: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.column_group = group
        self.handshake = Handshake(group)
        self.row_placements: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Guards differentiation that must not look like the wrapper's own backward.

        It may communicate, so every rank has to enter it, whatever it runs into inside.
        """
        yield

    def leaves(self) -> dict[Parameter, Tensor]:
        """Which tensor stands for a parameter in the autograd graph, if it is another one."""
        return {}

    def stand_ins(self) -> dict[Tensor, Parameter]:
        """What modules may hold in place of a parameter, with that parameter."""
        return {}

    def is_own(self, parameter: Tensor) -> bool:
        """Whether the wrapper reduces the gradient of ``parameter`` over ranks."""
        return True

    def reduce_accumulated(self, parameters: Sequence[Parameter]) -> None:
        """Reduces gradients that wait for a backward which is not going to take place."""
        return None  # nothing waits without a wrapper

    def takes_gradients(self, parameters: Collection[Parameter]) -> bool:
        """Whether ``write_gradients`` does for ``parameters`` what a backward would have done.

        The answer has to be the same on every rank.
        """
        return False

    def write_gradients(
        self,
        parameters: Sequence[Parameter],
        gradients: Sequence[Tensor | None],
        present: Sequence[bool],
    ) -> None:
        """Reduces and accumulates gradients as a backward would have done.

        Args:
            parameters: The parameters, in an order that is the same on every rank.
            gradients: This rank's gradients, of the parameters' shapes, or None. Each may be
                computed when it is asked for, and be asked for once.
            present: Whether any rank has a gradient for the parameter.
        """
        raise NotImplementedError

    def backward_factor(self, placement: Placement) -> float:
        """By what the global weights are multiplied before the wrapper's own reduction.

        The wrapper sums the ranks' gradients and divides by ``divisor``. Rows of its own
        (``Shard(0)``) and rows that add up (``Partial("sum")``) want the plain sum; estimates of
        the same rows (``Partial("avg")``) want the mean over ranks.
        """
        if is_average(placement):
            return self.divisor / self.group.size
        return self.divisor

    def run_once(self, jobs: Sequence[Job]) -> list[Tensor]:
        """The weights of each job from one run on rank 0, the same on every rank."""
        return run_on_rank_zero(self.group, jobs)

    def register(self, module: nn.Module) -> None:
        """Makes this the distribution of the module's parameters."""
        for name, parameter in module.named_parameters():
            self.names[parameter] = name
            _attached[parameter] = self

    def detach(self) -> None:
        """Undoes ``attach``: forgets the parameters."""
        for parameter in list(self.names):
            if _attached.get(parameter) is self:
                del _attached[parameter]
        self.names = WeakIdKeyDictionary()


def accumulate(parameter: Parameter, gradient: Tensor) -> None:
    """Adds to ``.grad`` as autograd does, in the parameter's dtype and layout."""
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
        return
    if gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def attached_distribution(parameter: Tensor) -> Distribution | None:
    """The distribution that ``parameter`` was attached to, if any."""
    found: Distribution | None = _attached.get(parameter)
    return found


def all_attached() -> list[Distribution]:
    """The distributions of all attached parameters, with repetitions."""
    return list(_attached.values())


def check_placement(placement: Placement) -> Placement:
    """Raises ValueError unless it is Shard(0), Partial("avg") or Partial("sum")."""
    if placement in POSSIBLE_PLACEMENTS:
        return placement
    raise ValueError(
        f"Found objectives={placement!r}; expected Shard(0) (every rank has objectives of its own)"
        ', Partial("avg") or Partial("sum") (every rank has an estimate of the same objectives).'
    )


def is_sharded(placement: Placement) -> bool:
    """Whether every rank has objectives of its own."""
    return placement == Shard(0)


def is_average(placement: Placement) -> bool:
    """Whether the global objectives are the means over ranks."""
    return isinstance(placement, Partial) and placement.reduce_op == "avg"
