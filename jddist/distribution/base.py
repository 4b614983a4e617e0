"""How a model's parameters and objectives are spread over ranks: the seam under everything else.

The engine and autojac ask a Distribution for a handful of verbs and never see the wrapper. A
placement says in DTensor's words where the rows of the Jacobian live: ``Shard(0)``: every rank has
objectives of its own; ``Partial("avg")`` or ``Partial("sum")``: every rank has an estimate of the
same rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Placement, Shard
from torch.nn.parameter import Parameter
from torch.utils.weak import WeakIdKeyDictionary

from jddist._progress import enter
from jddist.errors import LayoutMismatchError

from .collectives import Group
from .grid import Grid
from .handshake import Handshake
from .lockstep import Lockstep
from .once import Job, run_on_rank_zero

POSSIBLE_PLACEMENTS: tuple[Placement, ...] = (Shard(0), Partial("avg"), Partial("sum"))

# What ranks that have the same objectives tell alike.
_OF_OBJECTIVES = ("size", "count", "rows", "both")
# What of speed and memory passes over sharded parameters spare.
Reshard = Literal["memory", "speed"]

# The distribution that each attached parameter belongs to.
_attached: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Distribution:
    """How some parameters are distributed over ranks.

    Args:
        group: The ranks over which the objectives are spread.
        objectives: The placement that was stated for autojac's rows, or None.
        everyone: All ranks of the model; by default ``group``.
        columns: The ranks over which the columns of a row are sharded; by default ``group``.

    Attributes:
        group: The ranks over which the objectives are spread.
        everyone: All ranks of the model. There are more than in ``group`` where several ranks have
            the same objectives.
        columns: The ranks over which the columns of a row are sharded.
        lockstep: The ranks that have this rank's objectives, each with its shards of tensors.
        objectives: The placement stated at ``attach``, or None if none was.
        names: The attached parameters with their names, in the model's order.
        divisor: The number by which the wrapper divides the sum of the ranks' gradients: the
            number of ranks over which it averages. Set it to 1 if you registered a communication
            hook that sums.
        shards_columns: Whether every rank holds a part of each parameter, and of each row.
        reduces_every_backward: Whether several graphs cannot wait for one backward of them all.
        reshard: Whether sharded parameters are gathered for every row of tasks ("memory") or once
            for all of them ("speed").
    """

    shards_columns = False
    reduces_every_backward = False

    def __init__(
        self,
        group: Group,
        objectives: Placement | None,
        *,
        everyone: Group | None = None,
        columns: Grid | None = None,
    ) -> None:
        self.group = group
        self.everyone = everyone or group
        self.columns = columns or Grid(group, (group,))
        self.lockstep = Lockstep()
        self.reshard: Reshard = "memory"
        self.objectives = None if objectives is None else check_placement(objectives)
        self.divisor: float = group.size
        # Weak: the table of attached parameters owns this object, and must not keep models alive.
        self.names: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.handshake = Handshake(self.everyone)
        self.row_placements: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def by_objectives(self, infos: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What the ranks of ``group`` told in a handshake, of what everyone told.

        Raises:
            LayoutMismatchError: Ranks that have the same objectives told of others.
        """
        same = self.lockstep.group.size
        for start in range(0, len(infos), same):
            told = [
                {name: info[name] for name in _OF_OBJECTIVES if name in info}
                for info in infos[start : start + same]
            ]
            if any(one != told[0] for one in told):
                listed = ", ".join(f"rank {start + i}: {one}" for i, one in enumerate(told))
                raise LayoutMismatchError(
                    f"Found ranks of one tensor-parallel group with different batches ({listed}); "
                    "expected the same on each. Use a sampler for the data-parallel ranks alone."
                )
        return list(infos[self.everyone.rank % same :: same])

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """Guards differentiation that must not look like the wrapper's own backward.

        It may communicate, so every rank has to enter it, whatever it runs into inside.
        """
        yield

    @contextmanager
    def last_stage(self) -> Iterator[None]:
        """The stage in which gradients are written, also by the wrapper; it ends the step."""
        enter("backward")
        with self.group.naming():
            yield
        enter("forward")

    def traced(self, output: Tensor) -> Tensor:
        """Objectives like ``output`` on a graph that a first pass may differentiate."""
        return output

    def inside(self, tensor: Tensor) -> Tensor:
        """What the model computed with, if the wrapper handed out ``tensor`` in its place."""
        return tensor

    def check_gives_rows(self) -> None:
        """Raises UnsupportedModelError if only what ``traced`` returned can be differentiated."""
        return None

    def weighted_backward(self, output: Tensor, weights: Tensor, *, retain_graph: bool) -> None:
        """The wrapper's own backward from objectives with weights of their shape."""
        output.backward(weights, retain_graph=retain_graph)

    def keeps_gradient(self, tensor: Tensor) -> bool:
        """Whether the tensor's gradients belong to the wrapper instead of in ``.grad``."""
        return False

    def keep_gradient(self, tensor: Tensor, gradient: Tensor) -> None:
        """Adds to what the wrapper's next step uses a gradient that is the same on all ranks."""
        raise NotImplementedError

    def leaves(self) -> dict[Parameter, Tensor]:
        """Which tensor stands for a parameter in the autograd graph, if it is another one."""
        return {}

    def stand_ins(self) -> dict[Tensor, Parameter]:
        """What modules may hold in place of a parameter, with that parameter."""
        return {}

    def is_own(self, parameter: Tensor) -> bool:
        """Whether the wrapper reduces the gradient of ``parameter`` over ranks."""
        return True

    @property
    def reduces_others(self) -> bool:
        """Whether ``weighted_backward`` reduces the gradients that the wrapper does not."""
        return False

    def reduce_accumulated(self, parameters: Sequence[Parameter]) -> None:
        """Reduces gradients that wait for a backward which is not going to take place."""
        return None  # nothing waits without a wrapper

    def check_takes_backward(self) -> None:
        """Raises an error where the wrapper would not notice a backward from here."""
        return None

    def check_output(self, output: Tensor) -> None:
        """Raises an error if the wrapper will not reduce the gradients of these objectives."""
        return None

    def check_reduced(self) -> None:
        """Raises an error if a backward left the wrapper's reduction unfinished."""
        return None

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

    def place_gradients(self, parameters: Sequence[Parameter]) -> None:
        """After a backward: sees to it that gradients lie as their parameters do."""
        return None  # a wrapper does that itself

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
        return run_on_rank_zero(self.everyone, jobs)

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


def check_reshard(reshard: Reshard) -> Reshard:
    """Raises ValueError unless it is "memory" or "speed"."""
    if reshard not in ("memory", "speed"):
        raise ValueError(f"Found reshard={reshard!r}; expected 'memory' or 'speed'.")
    return reshard


def is_sharded(placement: Placement) -> bool:
    """Whether every rank has objectives of its own."""
    return placement == Shard(0)


def is_average(placement: Placement) -> bool:
    """Whether the global objectives are the means over ranks."""
    return isinstance(placement, Partial) and placement.reduce_op == "avg"
