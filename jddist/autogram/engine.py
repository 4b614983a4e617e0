"""The engine: the Gramian of the Jacobian without the Jacobian, and the weighted step.

One step goes through these stages: the local pass turns the output's graph into blocks of rows;
a handshake tells every rank what the others have; the exchange turns all blocks into the global
Gramian; a weighting runs on rank 0; the weighted losses go back through the user's own backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Shard

from jddist._autocast import without_autocast
from jddist._observing import Observers
from jddist.distribution.base import Distribution, Reshard, check_placement, check_reshard
from jddist.distribution.counts import Count
from jddist.distribution.lockstep import as_plain, mesh_of, on_mesh
from jddist.distribution.planning import Prefer, check_prefer
from jddist.distribution.select import distribution_of, select

from . import explanation
from .accumulation import Accumulation
from .agreement import Agreement
from .blocks import DEFAULT_BUDGET, Scratch
from .capture import Capture
from .contribution import Contributor
from .crossing import cross_gramian
from .global_pass import GlobalLayout
from .joining import Joining
from .local_pass import Blocks, LocalPass
from .members import Members, given_modules
from .parameters import ParameterTable
from .reporting import Reporter
from .rules import replays
from .step import Backward, Step, Weigher, stated


class Engine:
    """Computes Gramians of Jacobians, and takes Jacobian descent steps with them.

    The Gramian is that of all the objectives on all ranks, with respect to the trainable parameters
    of the given modules. It follows Algorithm 3 of Jacobian Descent For Multi-Objective
    Optimization (arXiv:2406.16232), layer by layer and without ever forming the Jacobian where a
    closed form exists. Create the engine before the forward pass, and only once.

    Args:
        modules: Modules, in DistributedDataParallel or fully_shard or not, whose parameters count,
            recursively; or one iterable of modules, whose direct parameters count. Their layers may
            be tensor-parallel.
        batch_dim: The dimension of the samples in the tensors of objectives. The modules must then
            treat the samples independently, with the samples first in all their tensors; what does
            not is noticed and computed by a slower exact way, or refused. None: no such dimension;
            always right, at the price of one backward pass per objective.
        objectives: Where the objectives live: ``Shard(0)`` if every rank has its own,
            ``Partial("avg")`` or ``Partial("sum")`` if every rank has an estimate of the same
            ones. By default ``Shard(0)`` with a ``batch_dim``, else ``Partial("avg")``.
        distribution: Pass ``Local()`` if several ranks run that have nothing to do with each
            other. By default it is found from the modules' wrapper.
        memory_budget: Bytes that intermediate results and rows held for the weighted gradient may
            take, besides the inputs of the layers and the gradients of their outputs. Less is
            slower: rows are then formed in smaller tiles, or twice. 40 MiB by default.
        nonfinite: What to do if an objective or its gradient is NaN or infinite: "raise"
            NonFiniteObjectiveError on every rank, or "skip": weights of zero for that step.
        prefer: How the exchange between ranks is chosen for each layer: "time" weighs the bytes
            that are sent and the operations of each rank, "bytes" takes the fewest bytes, which on
            many ranks may cost many times the operations. See :func:`jddist.distribution.plan`.
        reshard: For tasks in fully_shard: whether parameters are gathered for every task ("memory")
            or once for all of them ("speed"); see :func:`jddist.attach`. By default as stated
            there, else "memory".

    Attributes:
        observers: Who watches the steps, such as a ``jddist.monitoring.Recorder``.

    Raises:
        UnsupportedModelError: A module or a wrapper with which the answer cannot be exact.
        UnattachedParameterError: Several ranks run and the parameters belong to no wrapper.
        ValueError: There are no parameters, or ``objectives`` is no possible placement.
    """

    def __init__(
        self,
        *modules: nn.Module | Iterable[nn.Module],
        batch_dim: int | None,
        objectives: Placement | None = None,
        distribution: Distribution | None = None,
        memory_budget: int = DEFAULT_BUDGET,
        nonfinite: Literal["raise", "skip"] = "raise",
        prefer: Prefer = "time",
        reshard: Reshard | None = None,
    ) -> None:
        check_prefer(prefer)
        if reshard is not None:
            check_reshard(reshard)
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"Found nonfinite={nonfinite!r}; expected 'raise' or 'skip'.")
        given, recursive = given_modules(modules)
        # First of all: a wrapper may have to put parameters back into their modules.
        selected = distribution or select(given, None)
        members = Members(given, recursive)
        if objectives is None:
            objectives = Partial("avg") if batch_dim is None else Shard(0)
        placement = check_placement(objectives)
        table, batched = members.table, batch_dim is not None
        parameters = [entry.parameter for entry in table.trainable]
        self._distribution = distribution_of(parameters, selected)
        if reshard is not None:
            self._distribution.reshard = reshard
        members.check_reduced(self._distribution)
        members.check_current(self._distribution, batched=batched)
        capture = Capture(
            [owner.module for owner in table.owners],
            [owner.module for owner in table.owners if replays(owner.rule, batched)],
        )
        scratch = Scratch(memory_budget)
        self._contributor = Contributor(
            table=table,
            scope=members.scope,
            local_pass=LocalPass(
                table, batched, scratch, self._distribution.leaves, self._distribution.lockstep
            ),
            distribution=self._distribution,
            placement=placement,
            batch_dim=batch_dim,
            prefer=prefer,
            # A wrapper that the engine was told not to see still does its part of a backward.
            sees_wrappers=distribution is None or members.are_bare,
        )
        self.observers = Observers()
        self._reporter = Reporter(self.observers, self._distribution, placement)
        self._agreement = Agreement(members, self._contributor, self._reporter)
        tile = scratch.tile_elements(torch.float32)
        self._step = Step(self._contributor, capture, nonfinite, tile, self._reporter)
        self._joining = Joining(self._agreement, self._step)
        self._mesh: DeviceMesh | None = None  # of the last objectives, if they were a DTensor

    @property
    def distribution(self) -> Distribution:
        """How the parameters are distributed over ranks."""
        return self._distribution

    @property
    def table(self) -> ParameterTable:
        """The parameters that count, in the order in which the ranks agree."""
        return self._contributor.table

    @without_autocast()
    def compute_gramian(self, output: Tensor, /, *, count: Count | None = None) -> Tensor:
        """The generalized Gramian of all ranks' objectives, the same on every rank.

        Args:
            output: This rank's objectives, of any shape, with their graph (which is kept). The
                rank may have none: an output with no samples. On tensor-parallel layers it may be a
                DTensor that all ranks have alike.
            count: With ``Partial("avg")``, the number of samples over which this rank's objectives
                are means: an int, or one number per objective. The global objective is then the
                mean over all samples; without it, the mean over ranks.

        Returns:
            [] for a scalar, [m, m] for a vector, [m1, m2, m2, m1] for a matrix, and so on: entry
            [i, j, k, l] is the inner product of the gradients of objectives [i, j] and [l, k].
            Under ``Shard(0)`` the sharded dimension counts all ranks' samples, in rank order.

        Raises:
            NonFiniteObjectiveError: An objective or its gradient is NaN or infinite.
            LayoutMismatchError: The ranks disagree on shapes, dtype or parameters.
            RankError: Another rank failed before the exchange.
        """
        self._mesh, output = mesh_of(output), as_plain(output)
        self._reporter.begins()
        agreed = self._agreement.of_output(
            "Engine.compute_gramian", output, count, reusable=self._reporter.wants_layers
        )
        return self._step.gramian(output, agreed)

    def explain(self) -> str:
        """What the last Gramian took, as a table with one row per layer.

        It says for each module with parameters its rule, the form in which products of rows were
        computed, the exchange between ranks, and, predicted from shapes, the floating-point
        operations, the bytes that this rank sends, and the memory. Nothing is computed or sent;
        ranks may differ.
        """
        if self._taken is None:
            return "No step was taken yet: call compute_gramian or backward first."
        return explanation.as_text(explanation.reports(self.table, self._taken), self._taken)

    @property
    def _taken(self) -> explanation.Taken | None:
        return self._step.taken

    @without_autocast()
    def cross_gramian(
        self,
        first: Tensor,
        second: Tensor,
        /,
        *,
        counts: tuple[Count, Count] | None = None,
    ) -> Tensor:
        """The matrix J1 J2ᵀ of two batches' objectives, as MoDo and SDMGrad need it.

        Both batches have to go through the model before this call. The weights that it leads to
        belong to a step of its own: ``engine.backward(losses, weights)``.

        Args:
            first: This rank's objectives of the first batch, with their graph (which is kept).
            second: The same for the second batch. There may be another number of samples.
            counts: For each of the two, what ``compute_gramian`` calls ``count``.

        Returns:
            The global matrix [m1, m2], the same on every rank; for outputs [m1, k1] and [m2, k2]
            the tensor [m1, k1, k2, m2], and so on.

        Raises:
            The errors of ``compute_gramian``; NonFiniteObjectiveError also if ``nonfinite="skip"``.
        """
        values = cross_gramian(self._agreement, as_plain(first), as_plain(second), counts)
        self._step.agreed = None  # the weights belong to a step that is to come
        return values

    @without_autocast()
    def compute_weights(self, gramian: Tensor, weighting: Weigher) -> Tensor:
        """Weights of all objectives: one run of ``weighting`` on rank 0, the same on every rank.

        Args:
            gramian: A generalized Gramian, as ``compute_gramian`` gives it.
            weighting: A Weighting of jddist's or of torchjd's, or any callable on a Gramian.

        Returns:
            Weights of the shape of the (global) objectives.

        Raises:
            ValueError: The Gramian is not a matrix and the weighting is not generalized, or the
                weighting needs the Jacobian itself.
            RankError: The weighting raised on rank 0 of several ranks.
        """
        weights = self._step.weights(gramian, weighting)
        if self._step.agreed is not None:  # a cross Gramian's weights serve a step that is to come
            layout = self._step.agreed.layout
            self._reporter.ends(layout, gramian, weights, skipped=self._step.skip)
        return weights

    def local_weights(self, weights: Tensor, /) -> Tensor:
        """This rank's part of the global weights, ready for ``losses.backward(...)``.

        Args:
            weights: Weights of all objectives of the last ``compute_gramian``.

        Returns:
            Weights of the shape of this rank's output, times the factor that undoes the wrapper's
            averaging and, with counts, times this rank's share of the samples.

        Raises:
            RuntimeError: No Gramian was computed yet.
            ValueError: The weights do not have the shape of the global objectives.
            UnsupportedModelError: Some parameters are beside the sharded ones, which ``backward``
                alone reduces.
        """
        self._agreement.members.check_no_others(
            self._distribution, "Call engine.backward(losses, weights), which does."
        )
        local = self._step.local_weights(weights)
        self._step.watch()
        return on_mesh(local, self._mesh)

    @without_autocast()
    def backward(
        self,
        output: Tensor,
        weighting_or_weights: Weigher | Tensor,
        /,
        *,
        count: Count | None = None,
        scale: float | Tensor | None = None,
        retain_graph: bool = False,
        backward: Backward | None = None,
    ) -> Tensor:
        """A whole step: Gramian, weights, weighted gradient.

        ``.grad`` comes out as the wrapper's own backward makes it, so clipping, accumulation,
        schedulers and optimizers work unchanged. Where nothing else depends on that backward, it
        is left out: the rows that gave the Gramian give the gradient. Every rank has to call, also
        one without samples.

        Args:
            output: This rank's objectives, with their graph.
            weighting_or_weights: A weighting (any callable on the Gramian), or the weights of all
                objectives, of the shape of the global output.
            count: See ``compute_gramian``.
            scale: By what the output was multiplied, if it comes from a GradScaler:
                ``engine.backward(scaler.scale(losses), weighting, scale=scaler.get_scale())``. The
                weighting then sees the Gramian of the unscaled objectives. What overflows is no
                error: all gradients, and the weights, become NaN, so that the scaler skips the
                step on every rank and lowers its scale.
            retain_graph: Whether to keep the graph.
            backward: A framework's own way of going back, where ``output.backward`` is not the one:
                called with the output and this rank's weights for it, of its shape. It decides what
                is kept of the graph, and may divide by a number of micro-batches.

        Returns:
            The weights of all objectives. Within ``accumulate`` an empty tensor: they are known at
            its end.

        Raises:
            The errors of ``compute_gramian`` and ``compute_weights``; ``.grad`` is then untouched,
            and the graph may be freed.
        """
        if backward is None:  # a framework's own gets what it was given
            self._mesh, output = mesh_of(output), as_plain(output)
        if self._joining.is_open:
            if backward is not None:
                raise ValueError(
                    "Found a backward= within engine.accumulate(), which goes back through all "
                    "batches at once; expected none. Accumulate as the framework does."
                )
            self._joining.add(output, weighting_or_weights, count, scale)
            return output.new_empty(0)
        if backward is not None:
            self._agreement.members.check_no_others(
                self._distribution, "Leave out backward=, and jddist does."
            )
        call = "Engine.backward"
        self._reporter.begins()
        gramian: Tensor | None = None
        blocks: Blocks = []
        try:
            if isinstance(weighting_or_weights, Tensor):
                weights = weighting_or_weights
                agreed = self._agreement.of_output(call, output, count, weights=weights)
                self._step.agreed, self._step.skip = agreed, False
            else:
                agreed = self._agreement.of_output(
                    call,
                    output,
                    count,
                    step=backward is None,
                    retain_graph=retain_graph,
                    told={"losses stated to the weighting": stated(weighting_or_weights)},
                    reusable=self._reporter.wants_layers,
                )
                blocks = agreed.blocks
                gramian = self._step.gramian(output, agreed, scale)
                weights = self._step.weights(gramian, weighting_or_weights, scale)
                if not self.observers:  # it may be as large as a layer
                    gramian = None
            with self._contributor.distribution.last_stage():
                self._step.write_gradients(
                    output,
                    blocks,
                    weights,
                    uncounted=agreed.uncounted,
                    retain_graph=retain_graph,
                    backward=backward,
                )
        finally:
            for block in blocks:
                if block is not None:
                    block.release()
        self._reporter.ends(agreed.layout, gramian, weights, skipped=self._step.skip, scale=scale)
        return weights

    @contextmanager
    def accumulate(self) -> Iterator[Accumulation]:
        """Within this context, the batches given to ``backward`` join one Gramian.

        They count as if they were further ranks: with ``Shard(0)`` their objectives are
        concatenated, with ``Partial`` their estimates are added or averaged (over all samples if
        ``count`` is given, else over all batches of all ranks). At the end of the context the
        weighting runs once, and the weighted gradients go back through the batches' graphs, which
        are freed. Gradients are those of the whole batch, not a sum or mean over micro-batches::

            with engine.accumulate() as accumulation:
                for x, y in micro_batches:
                    engine.backward(criterion(model(x), y), weighting)
            accumulation.weights  # of all objectives

        Until then all batches' graphs stay in memory, and what the closed forms keep of them: of a
        layer its inputs and the gradients of its outputs; with ``Partial`` also m times the
        parameters. On several ranks, rows of ``Shard(0)`` are exchanged in full. Every rank has to
        enter with at least one batch, which may be empty; in fully_shard, whose forwards are a
        matter of all ranks, with as many batches as the others. There tasks (``Partial``) are
        differentiated and reduced batch by batch: no graph is kept, and of the rows this rank's
        columns of their sum.

        Yields:
            What holds the weights, once the context has ended.

        Raises:
            The errors of ``compute_gramian`` and ``compute_weights``, at the end of the context.
            What is raised within the context passes through, and the other ranks raise a RankError:
            at the end of the context, or in fully_shard at their next forward or batch. (There, of
            what is raised in the middle of a forward they hear when its messages time out.)
        """
        with self._joining.accumulate() as accumulation:
            yield accumulation

    def prepare(
        self, call: str, output: Tensor, count: Count | None
    ) -> tuple[GlobalLayout, Blocks]:
        """The first two stages, the local pass and the handshake, for those who look inside.

        Args:
            call: The public function under way, which has to be the same on every rank.
            output: This rank's objectives.
            count: See ``compute_gramian``.

        Returns:
            How this rank's objectives lie among all, and its blocks of rows.
        """
        agreed = self._agreement.of_output(call, output, count, reusable=True)
        return agreed.layout, agreed.blocks
