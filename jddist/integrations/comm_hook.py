"""Objectives that are whole ranks: a communication hook for DistributedDataParallel.

Each rank has one objective, its own loss, so the Jacobian has one row per rank: the gradient that
DDP would average. The hook aggregates the rows instead. They become column shards by an
all-to-all, one all-reduce sums the Gramian, a weighting runs on rank 0, every rank aggregates its
columns, and an all-gather brings the result together: about as many bytes as the ring all-reduce
that it replaces.
"""

# No postponed annotations here: DDP reads those of a hook as types.
import hashlib
import warnings
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.distributed import GradBucket, ProcessGroup, group
from torch.distributed.tensor import Shard
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from jddist._stateful import Stateful
from jddist.aggregation import Aggregator
from jddist.aggregation._losses import stated_losses
from jddist.autojac._groups import call_aggregator
from jddist.autojac._over_ranks import shared_settings
from jddist.autojac._sharded import RowGroup, aggregate
from jddist.distribution.base import Distribution
from jddist.distribution.collectives import Group
from jddist.distribution.columns import check_acts_on_columns
from jddist.errors import NonFiniteObjectiveError, UnsupportedModelError

NonFinite = Literal["raise", "skip", "propagate"]


class _Part:
    """A bucket's tensors; DDP's own object does not outlive the hook's call."""

    def __init__(self, bucket: GradBucket) -> None:
        self.buffer = bucket.buffer()
        self.parameters: list[Tensor] = bucket.parameters()
        self._gradients = None if self.buffer.is_sparse else bucket.gradients()
        devices: list[int | str | torch.device] | None = None
        if self.buffer.is_cuda:
            devices = [self.buffer.device]
        self.future: Future[Tensor] = Future(devices=devices)

    def entries(self) -> list[tuple[Tensor, Tensor]]:
        """Each parameter with its gradient, a view of the buffer."""
        gradients = [self.buffer] if self._gradients is None else self._gradients
        return list(zip(self.parameters, gradients, strict=True))


class RankObjectives:
    """The state of :func:`rank_objectives_hook`: what aggregates the ranks' gradients, and how.

    Every rank is one objective. Krum and TrimmedMean make the step robust against ranks that send
    anything that is finite; UPGrad makes it one that no rank's loss objects to; Mean is DDP's own::

        ddp.register_comm_hook(RankObjectives(Krum(n_byzantine=1)), rank_objectives_hook)

    A rank's gradient is what its backward leaves in ``.grad``: of the mean over its batch, summed
    over micro-steps under ``no_sync``. All else stays DDP's: options, clipping, optimizers. Ranks
    that have run out of data within ``ddp.join()`` count as objectives with a gradient of zero.

    Args:
        aggregator: Maps the Jacobian [W, n] of W ranks to the gradient [n] of all of them. Half
            precision gradients are aggregated in float32.
        together: Whether all parameters form one Jacobian, with one Gramian, which is exact and
            waits for the whole backward; else each of DDP's buckets forms one of its own, while the
            backward goes on.
        parameters: The parameters in the order of the columns. By default that of the first
            backward, which is the model's for one dtype. It matters to aggregators with random or
            stored values per column (GradDrop, ExcessMTL, MoCo, DBMTL) alone.
        process_group: DDP's process group; by default that of all ranks. ``register`` finds it.
        nonfinite: What to do if a rank's gradient has a NaN or an infinity: "raise"
            NonFiniteObjectiveError on every rank at the end of the backward, with all ``.grad``
            None; "skip": a warning, and gradients of zero for that step (or bucket); "propagate":
            gradients of NaN on every rank, by which a GradScaler knows to skip the step.

    Attributes:
        weights: Of the last backward, for each Jacobian the weights [W], the same on all ranks;
            None of an aggregator without weights.

    Raises:
        ValueError: The aggregator needs all columns at once; it is stateful while every bucket
            would be a stream of Jacobians of its own; or an argument is none of the above.
    """

    # Engines rely on DDP's mean, and refuse wrappers whose hook does something else.
    aggregates_ranks = True

    def __init__(
        self,
        aggregator: Aggregator,
        *,
        together: bool = True,
        parameters: Iterable[Tensor] | None = None,
        process_group: ProcessGroup | None = None,
        nonfinite: NonFinite = "raise",
    ) -> None:
        if not isinstance(aggregator, Aggregator):
            raise ValueError(
                f"Found {aggregator!r} as the aggregator; expected one of jddist.aggregation, "
                "which maps a Jacobian to a vector. Pass e.g. Krum(n_byzantine=1)."
            )
        check_acts_on_columns(aggregator)
        if not together and any(isinstance(m, Stateful) for m in aggregator.modules()):
            raise ValueError(
                f"Found the stateful {type(aggregator).__name__} with together=False; expected an "
                "aggregator without state, since every bucket is a Jacobian of its own and DDP "
                "changes its buckets. Pass together=True."
            )
        if nonfinite not in get_args(NonFinite):
            raise ValueError(
                f"Found nonfinite={nonfinite!r}; expected one of {get_args(NonFinite)}."
            )
        self.aggregator = aggregator
        self.together = together
        self.nonfinite = nonfinite
        self.weights: list[Tensor | None] = []
        self._order = None if parameters is None else _positions(parameters)
        self._process_group = process_group
        self._ranks: Distribution | None = None
        self._pending: list[_Part] = []
        self._error: Exception | None = None

    def register(self, ddp: DistributedDataParallel) -> None:
        """Registers the hook, with the wrapper's own process group and order of parameters."""
        self._process_group = ddp.process_group
        trained = [p for p in ddp.module.parameters() if p.requires_grad]
        self._order = self._order or _positions(trained)
        ddp.register_comm_hook(self, rank_objectives_hook)

    def take(self, bucket: GradBucket) -> Future[Tensor]:
        """What the hook does with a bucket."""
        if bucket.index() == 0:  # also after a backward that was abandoned
            self._pending, self._error, self.weights = [], None, []
        part = _Part(bucket)
        self._pending.append(part)
        if not self.together:
            self._reduce([part])
        elif bucket.is_last():
            self._reduce(self._pending)
        if bucket.is_last():
            if self._error is not None:
                self._raise_later(self._error)
            self._pending = []
        return part.future

    def _reduce(self, parts: list[_Part]) -> None:
        """Replaces the ranks' own gradients in the buckets, and completes the futures."""
        try:
            if self._error is None:  # on every rank, or on none
                self._aggregate(parts)
        except Exception as error:
            self._error = error
        for part in parts:
            if self._error is not None:
                part.buffer.zero_()
            part.future.set_result(part.buffer)

    def _aggregate(self, parts: list[_Part]) -> None:
        if self._ranks is None:
            ranks = Group(self._process_group or group.WORLD)
            self._ranks = Distribution(ranks, Shard(0))
        error: Exception | None = None
        agree: dict[str, object] = {}
        entries: list[tuple[Tensor, Tensor]] = []
        try:
            entries = self._ordered([entry for part in parts for entry in part.entries()])
            agree = self._agreement(entries)
        except Exception as failure:  # raised again on every rank, by the handshake
            error = failure
        self._ranks.handshake("rank_objectives_hook", agree, {}, error)
        gradients = [gradient for _, gradient in entries]
        with torch.no_grad():
            rows = _row(gradients)
            counts = [1] * self._ranks.group.size
            row_group = RowGroup(rows, counts, Shard(0), self.aggregator)
            try:
                ((vector, weights),) = aggregate([row_group], self._ranks, _call_in_float32)
            except NonFiniteObjectiveError as failure:
                if self.nonfinite == "raise":
                    raise
                fill = torch.nan
                if self.nonfinite == "skip":
                    warnings.warn(f"{failure} This step's gradients are zero.", stacklevel=2)
                    fill = 0.0
                vector = rows.new_full((rows.shape[1],), fill)
                weights = rows.new_full((len(counts),), fill)
            pieces = vector.split([gradient.numel() for gradient in gradients])
            for gradient, piece in zip(gradients, pieces, strict=True):
                gradient.copy_(piece.view(gradient.shape))
        self.weights.append(weights)

    def _ordered(self, entries: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Parameters and gradients in an order that outlives DDP's buckets."""
        if self._order is None:
            if not self.together:
                return entries
            # At first DDP fills its buckets from the last parameter to the first.
            found = [parameter for part in reversed(self._pending) for parameter in part.parameters]
            self._order = _positions(found)
        unknown = [tuple(p.shape) for p, _ in entries if p not in self._order]
        if unknown:
            raise ValueError(
                f"Found parameters of shapes {unknown} in DDP's buckets that are not among the "
                "given ones; expected all trainable parameters. Use one RankObjectives for each "
                "wrapper, and pass parameters=ddp.parameters() or nothing."
            )
        order = self._order
        return sorted(entries, key=lambda entry: order[entry[0]])

    def _agreement(self, entries: list[tuple[Tensor, Tensor]]) -> dict[str, object]:
        if any(gradient.is_sparse for _, gradient in entries):
            raise UnsupportedModelError(
                "Found sparse gradients; expected dense ones. Use Embedding(..., sparse=False)."
            )
        shapes = repr([tuple(p.shape) for p, _ in entries])
        digest = hashlib.blake2b(shapes.encode(), digest_size=8).hexdigest()
        return {
            "parameters of the buckets": f"{len(entries)} with digest {digest}",
            "dtypes": sorted({str(gradient.dtype) for _, gradient in entries}),
            "aggregators": type(self.aggregator).__name__,
            "settings of the aggregators": shared_settings(self.aggregator),
            "losses stated to aggregators": stated_losses(self.aggregator),
            "together and nonfinite": [self.together, self.nonfinite],
        }

    def _raise_later(self, error: Exception) -> None:
        """Raises at the end of the backward, when DDP has come to rest and can be used again."""
        parameters = [p for part in self._pending for p in part.parameters]

        def fail() -> None:
            for parameter in parameters:
                parameter.grad = None  # by now it holds this rank's own, or zeros
            raise error

        def after_finalizing() -> None:
            Variable._execution_engine.queue_callback(fail)

        # DDP queues its own end after this hook's; what is queued by a callback comes after both.
        Variable._execution_engine.queue_callback(after_finalizing)


def rank_objectives_hook(state: RankObjectives, bucket: GradBucket) -> Future[Tensor]:
    """A DDP communication hook that aggregates the ranks' gradients instead of averaging them.

    Args:
        state: What aggregates them.
        bucket: Gradients of this rank, from DDP.

    Returns:
        A future of the bucket's aggregated gradients, the same on all ranks.

    Raises:
        NonFiniteObjectiveError: A rank's gradient is NaN or infinite. Like the others it comes out
            of ``backward`` on every rank, with all ``.grad`` None; training may go on.
        RankError: The weighting failed on rank 0, or a rank before the exchange.
        LayoutMismatchError: The ranks have different aggregators or settings.
        UnsupportedModelError: There are sparse gradients.
    """
    return state.take(bucket)


def _positions(parameters: Iterable[Tensor]) -> dict[Tensor, int]:
    return {parameter: i for i, parameter in enumerate(parameters)}


def _row(gradients: list[Tensor]) -> Tensor:
    """The gradients as one row [1, n], in the widest of their dtypes."""
    dtype = gradients[0].dtype
    for gradient in gradients[1:]:
        dtype = torch.promote_types(dtype, gradient.dtype)
    return torch.cat([gradient.reshape(-1).to(dtype) for gradient in gradients]).unsqueeze(0)


def _call_in_float32(aggregator: Aggregator, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """Half precision travels between ranks, but neither weights nor sums are rounded to it."""
    vector, weights = call_aggregator(
        aggregator, matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    )
    return vector.to(matrix.dtype), weights
