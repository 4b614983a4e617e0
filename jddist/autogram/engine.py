"""The engine: the Gramian of the Jacobian without the Jacobian, and the weighted step.

One step goes through these stages: the local pass turns the output's graph into blocks of rows;
a handshake tells every rank what the others have; the exchange turns all blocks into the global
Gramian; a weighting runs on rank 0; the weighted losses go back through the user's own backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Placement, Shard

from jddist._observing import Observers
from jddist.aggregation import Flattening, GeneralizedWeighting, Weighting
from jddist.aggregation._weightings import check_takes_gramians
from jddist.distribution.base import Distribution, check_placement, is_average
from jddist.distribution.counts import Count
from jddist.distribution.exchange import describe
from jddist.distribution.fully_shard import FullyShard
from jddist.distribution.once import Job
from jddist.distribution.planning import Plan, Prefer, check_prefer
from jddist.distribution.select import distribution_of, select, unwrap
from jddist.errors import UnsupportedModelError

from . import explanation, global_pass, reporting
from .accumulation import Accumulation, Joined, MicroBatch
from .blocks import DEFAULT_BUDGET, Scratch
from .book_keeping import Books, agreed, combined, differentiated
from .capture import Capture, paused
from .contribution import Contribution, Contributor
from .global_pass import GlobalLayout
from .joint import JointOutput
from .local_pass import Blocks, LocalPass
from .parameters import ParameterTable, build_table, scope_of
from .refusals import check_modules, explained
from .row_blocks import row_blocks
from .rules import replays

Weigher = Callable[[Tensor], Tensor]


class Engine:
    """Computes Gramians of Jacobians, and takes Jacobian descent steps with them.

    The Gramian is that of all the objectives on all ranks, with respect to the trainable parameters
    of the given modules. It follows Algorithm 3 of Jacobian Descent For Multi-Objective
    Optimization (arXiv:2406.16232), layer by layer and without ever forming the Jacobian where a
    closed form exists. Create the engine before the forward pass, and only once.

    Args:
        modules: Modules, in DistributedDataParallel or fully_shard or not, whose parameters count,
            recursively; or one iterable of modules, whose direct parameters count.
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
            slower: rows are then formed in smaller tiles, or twice. 96 MiB by default.
        nonfinite: What to do if an objective or its gradient is NaN or infinite: "raise"
            NonFiniteObjectiveError on every rank, or "skip": weights of zero for that step.
        prefer: How the exchange between ranks is chosen for each layer: "time" weighs the bytes
            that are sent and the operations of each rank, "bytes" takes the fewest bytes, which on
            many ranks may cost many times the operations. See :func:`jddist.distribution.plan`.

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
    ) -> None:
        check_prefer(prefer)
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"Found nonfinite={nonfinite!r}; expected 'raise' or 'skip'.")
        given, recursive = _given_modules(modules)
        selected = distribution or select(given, None)
        scope = scope_of([unwrap(m) for m in given], recursive)
        if objectives is None:
            objectives = Partial("avg") if batch_dim is None else Shard(0)
        self._batch_dim = batch_dim
        self._placement = check_placement(objectives)
        self._nonfinite = nonfinite
        self._scope = scope
        self._roots = [unwrap(m) for m in given] if recursive else []
        self._table = build_table(scope)
        if not self._table.trainable:
            raise ValueError(
                "Found no trainable parameters in the given modules; expected some. Pass the model "
                "itself, or model.modules(): of an iterable only direct parameters count."
            )
        parameters = [entry.parameter for entry in self._table.trainable]
        self._distribution = distribution_of(parameters, selected)
        self._check_reduced()
        self._check_modules()
        self._capture = Capture(
            [owner.module for owner in self._table.owners],
            [o.module for o in self._table.owners if replays(o.rule, batch_dim is not None)],
        )
        scratch = Scratch(memory_budget)
        self._local_pass = LocalPass(
            self._table, batch_dim is not None, scratch, self._distribution.leaves
        )
        self._contributor = Contributor(
            table=self._table,
            scope=scope,
            local_pass=self._local_pass,
            distribution=self._distribution,
            placement=self._placement,
            batch_dim=batch_dim,
            prefer=prefer,
            # A wrapper that the engine was told not to see still does its part of a backward.
            sees_wrappers=distribution is None or all(unwrap(m) is m for m in given),
        )
        self._accumulation: Accumulation | None = None
        self._prefer = prefer
        self._tile = scratch.tile_elements(torch.float32)
        self._taken: explanation.Taken | None = None
        self._layout: GlobalLayout | None = None
        self._dtype = torch.float32
        self._books = Books.NO
        self._skip = False
        self._warned_uneven = False
        self.observers = Observers()
        self._reporter = reporting.Reporter(self.observers, self._distribution, self._placement)

    @property
    def distribution(self) -> Distribution:
        """How the parameters are distributed over ranks."""
        return self._distribution

    @property
    def table(self) -> ParameterTable:
        """The parameters that count, in the order in which the ranks agree."""
        return self._table

    def compute_gramian(self, output: Tensor, /, *, count: Count | None = None) -> Tensor:
        """The generalized Gramian of all ranks' objectives, the same on every rank.

        Args:
            output: This rank's objectives, of any shape, with their graph (which is kept). The
                rank may have none: an output with no samples.
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
        self._reporter.begins()
        layout, blocks = self.prepare("Engine.compute_gramian", output, count)
        return self._gramian(output, layout, blocks)

    def _gramian(
        self,
        output: Tensor,
        layout: GlobalLayout,
        blocks: Blocks,
        scale: float | Tensor | None = None,
    ) -> Tensor:
        parts = self._reporter.gramian(layout, blocks, output, self._table, self._prefer, scale)
        self._layout, self._skip = layout, False
        self._taken = self._taken_with(layout, blocks, parts.plan)
        if not parts.finite and scale is None:
            error = global_pass.nonfinite_error(layout, parts)
            if self._nonfinite == "raise":
                raise error
            warnings.warn(f"{error} The weights of this step are zero.", stacklevel=3)
            self._skip = True
        values = parts.values if scale is None else parts.values / float(scale) ** 2
        if scale is not None and not parts.finite:
            values = torch.full_like(values, torch.nan)
        return layout.whole.generalized(values.to(torch.promote_types(output.dtype, torch.float32)))

    def _scaled_weights(
        self, gramian: Tensor, weighting: Weigher, scale: float | Tensor | None
    ) -> Tensor:
        """``compute_weights``, or NaN where a GradScaler's objectives overflow."""
        if scale is not None and bool(gramian.isnan().any()):
            return gramian.new_full(gramian.shape[: gramian.ndim // 2], torch.nan)
        return self._weights(gramian, weighting)

    def explain(self) -> str:
        """What the last Gramian took, as a table with one row per layer.

        It says for each module with parameters its rule, the form in which products of rows were
        computed, the exchange between ranks, and, predicted from shapes, the floating-point
        operations, the bytes that this rank sends, and the memory. Nothing is computed or sent;
        ranks may differ.
        """
        if self._taken is None:
            return "No step was taken yet: call compute_gramian or backward first."
        return explanation.as_text(explanation.reports(self._table, self._taken), self._taken)

    def _taken_with(
        self, layout: GlobalLayout, blocks: Blocks, plan: Plan | None
    ) -> explanation.Taken:
        return explanation.Taken(
            tuple(describe(blocks, factors=True)),
            layout.local.batch,
            layout.local.objectives,
            self._local_pass.direct,
            self._distribution.group.rank,
            plan,
            torch.promote_types(self._dtype, torch.float32).itemsize,
            self._tile,
        )

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
        joint: JointOutput | None = None

        def local() -> Contribution:
            nonlocal joint
            layouts = [self._contributor.layout_of(output) for output in (first, second)]
            joint = JointOutput.of(first, second, *layouts)
            return self._contributor.of_pair(joint, counts)

        layout, blocks, infos = self._agree(
            "Engine.cross_gramian", local, passes=not self._contributor.by_passes
        )
        assert joint is not None
        parts = global_pass.gramian(
            self._distribution, layout, blocks, joint.output, self._table, self._prefer
        )
        self._layout = None
        if not parts.finite:
            raise global_pass.nonfinite_error(layout, parts)
        values = parts.values.to(torch.promote_types(joint.output.dtype, torch.float32))
        sizes = [info["both"] for info in infos] if layout.sharded else None
        return joint.cross(values, sizes)

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
        weights = self._weights(gramian, weighting)
        if self._layout is not None:  # a cross Gramian's weights go into a step that is to come
            self._reporter.ends(self._layout, gramian, weights, skipped=self._skip)
        return weights

    def _weights(self, gramian: Tensor, weighting: Weigher) -> Tensor:
        check_takes_gramians(weighting)
        plain = isinstance(weighting, Weighting) and not isinstance(weighting, GeneralizedWeighting)
        if plain and gramian.ndim != 2:
            raise ValueError(
                f"Found {type(weighting).__name__} on a generalized Gramian of shape "
                f"{tuple(gramian.shape)}; expected a matrix or a GeneralizedWeighting. Use "
                f"{Flattening.__name__}({type(weighting).__name__}(...))."
            )
        shape = gramian.shape[: gramian.ndim // 2]
        if self._skip or gramian.numel() == 0:
            return gramian.new_zeros(shape)
        self.observers.weighs([weighting])
        (weights,) = self._distribution.run_once([Job(weighting, gramian, shape)])
        self.observers.weighed([weighting])
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
        """
        if self._layout is None:
            raise RuntimeError(
                "Found no Gramian to which the weights could belong; expected a call of "
                "compute_gramian (or backward) first."
            )
        factor = self._distribution.backward_factor(self._placement)
        return (self._layout.local_part(weights.detach()) * factor).to(self._dtype)

    def backward(
        self,
        output: Tensor,
        weighting_or_weights: Weigher | Tensor,
        /,
        *,
        count: Count | None = None,
        scale: float | Tensor | None = None,
        retain_graph: bool = False,
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

        Returns:
            The weights of all objectives. Within ``accumulate`` an empty tensor: they are known at
            its end.

        Raises:
            The errors of ``compute_gramian`` and ``compute_weights``; ``.grad`` is then untouched,
            and the graph may be freed.
        """
        if self._accumulation is not None:
            return self._accumulate_batch(output, weighting_or_weights, count, scale)
        self._reporter.begins()
        gramian: Tensor | None = None
        blocks: Blocks = []
        try:
            if isinstance(weighting_or_weights, Tensor):
                weights, self._books = weighting_or_weights, Books.NO
                self._layout, _ = self.prepare("Engine.backward", output, count, weights=weights)
                self._skip = False
            else:
                layout, blocks = self.prepare(
                    "Engine.backward", output, count, step=True, retain_graph=retain_graph
                )
                gramian = self._gramian(output, layout, blocks, scale)
                weights = self._scaled_weights(gramian, weighting_or_weights, scale)
            self._write_gradients(output, blocks, weights, retain_graph)
        finally:
            for block in blocks:
                if block is not None:
                    block.release()
        assert self._layout is not None
        self._reporter.ends(self._layout, gramian, weights, skipped=self._skip, scale=scale)
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
        enter with at least one batch, which may be empty.

        Yields:
            What holds the weights, once the context has ended.

        Raises:
            The errors of ``compute_gramian`` and ``compute_weights``, at the end of the context.
            What is raised within the context passes through, and reaches the other ranks there.
        """
        if self._accumulation is not None:
            raise RuntimeError(
                "Found engine.accumulate() inside of engine.accumulate(); expected one. Give all "
                "batches to the outer one."
            )
        if isinstance(self._distribution, FullyShard):
            raise UnsupportedModelError(
                "Found engine.accumulate() with fully_shard, which reduces after every backward; "
                "expected another wrapper. Take larger batches, or a step per micro-batch."
            )
        accumulation = self._accumulation = Accumulation()
        try:
            yield accumulation
        except Exception as error:
            self._accumulation = None
            try:
                self._join(accumulation, error)
            except Exception:
                pass  # for the other ranks; here the first error counts
            raise
        finally:
            self._accumulation = None
        self._join(accumulation, None)

    def _join(self, accumulation: Accumulation, error: Exception | None) -> None:
        """The step of all accumulated batches; what failed before fails on every rank."""
        joined: Joined | None = None
        self._reporter.begins()

        def local() -> Contribution:
            nonlocal joined
            if error is not None:
                raise error
            joined = accumulation.joined(self._placement)
            return self._contributor.of_joined(joined)

        layout, blocks, _ = self._agree("Engine.accumulate", local, passes=False)
        assert joined is not None
        gramian = self._gramian(joined.output, layout, blocks, accumulation.scale)
        weights = self._scaled_weights(gramian, accumulation.weighting, accumulation.scale)
        accumulation.weights = weights
        if self._skip:
            entries = self._table.trainable
            self._distribution.reduce_accumulated([e.parameter for e in entries])
        else:
            local_weights = joined.weights_of_batches(self.local_weights(weights))
            torch.autograd.backward(joined.outputs, local_weights)
            self._capture.release_passed()
        scale = accumulation.scale
        self._reporter.ends(layout, gramian, weights, skipped=self._skip, scale=scale)

    def _accumulate_batch(
        self,
        output: Tensor,
        weighting: Weigher | Tensor,
        count: Count | None,
        scale: float | Tensor | None,
    ) -> Tensor:
        assert self._accumulation is not None
        layout = self._contributor.layout_of(output)
        self._check_modules()
        with self._distribution.first_pass():
            blocks = self._local_pass.blocks(output, layout)
        counts = self._contributor.rows_of_count(count, layout)
        batch = MicroBatch(output, layout, blocks, counts, self._local_pass.samples)
        self._accumulation.add(batch, weighting, None if scale is None else float(scale))
        return output.new_empty(0)

    def _write_gradients(
        self, output: Tensor, blocks: Blocks, weights: Tensor, retain_graph: bool
    ) -> None:
        entries = self._table.trainable
        if self._skip:
            # Micro-steps under no_sync rely on the reduction of the step that is skipped.
            self._distribution.reduce_accumulated([e.parameter for e in entries])
            return
        local = self.local_weights(weights)
        assert self._layout is not None
        # The records live as long as the graph's own tensors.
        kept = paused() if retain_graph else nullcontext()
        if self._books is Books.NO or weights.numel() == 0:
            with kept:
                output.backward(local, retain_graph=retain_graph)
        else:
            if self._books is Books.ROWS:
                gradients = combined(self._layout, blocks, entries, local)
            else:
                with kept:
                    gradients = differentiated(
                        self._distribution, output, entries, local, retain_graph=retain_graph
                    )
            present = [self._layout.has_rows(e.index) for e in entries]
            parameters = [e.parameter for e in entries]
            self._distribution.write_gradients(parameters, gradients, present)
        if not retain_graph:
            self._capture.release_passed()

    def prepare(
        self,
        call: str,
        output: Tensor,
        count: Count | None,
        *,
        weights: Tensor | None = None,
        step: bool = False,
        retain_graph: bool = True,
    ) -> tuple[GlobalLayout, Blocks]:
        """The first two stages, the local pass and the handshake. What fails fails on every rank.

        Args:
            call: The public function under way, which has to be the same on every rank.
            output: This rank's objectives.
            count: See ``compute_gramian``.
            weights: Weights that are given already: then no rows are needed, and only the layout
                is agreed on.
            step: Whether the weighted gradient is to come from the blocks, if that is possible.
            retain_graph: Whether to keep the graph even so.
        """

        def local() -> Contribution:
            return self._contributor.of_output(output, count, weights, step, retain_graph)

        passes = weights is None and not self._contributor.by_passes
        layout, blocks, _ = self._agree(call, local, passes=passes)
        if weights is None and self._contributor.by_passes:
            assert isinstance(self._distribution, FullyShard)
            factor = self._distribution.backward_factor(self._placement)
            layout, blocks = row_blocks(self._distribution, layout, output, self._table, factor)
        return layout, blocks

    def _agree(
        self, call: str, find_local: Callable[[], Contribution], *, passes: bool
    ) -> tuple[GlobalLayout, Blocks, list[dict[str, Any]]]:
        """The layout that follows from what all ranks found, and what every rank told."""
        error: Exception | None = None
        local = Contribution()
        # Outside of the attempt: every rank has to enter, whatever it runs into inside.
        with self._distribution.first_pass() if passes else nullcontext():
            try:
                self._check_modules()
                local = find_local()
            except Exception as failure:  # it is raised again on every rank, by the handshake
                error = explained(failure)
        agree = {**local.agree, **self._reporter.to_agree()}
        infos = self._distribution.handshake(call, agree, local.info, error)
        assert local.layout is not None
        self._dtype = local.dtype
        self._warn_if_uneven(infos)
        self._books = agreed([info["books"] for info in infos], local.books)
        rank = self._distribution.group.rank
        layout = GlobalLayout.of(local.layout, infos, rank, self._placement)
        return layout, local.blocks, infos

    def _warn_if_uneven(self, infos: list[dict[str, Any]]) -> None:
        samples = [info["samples"] for info in infos]
        uneven = is_average(self._placement) and len(set(samples)) > 1
        if uneven and infos[0]["count"] is None and not self._warned_uneven:
            self._warned_uneven = True
            warnings.warn(
                f"Found different batch sizes on the ranks ({', '.join(map(str, samples))}) and no "
                "count: the global objective is the plain mean over ranks. Pass count= (this "
                "rank's number of samples) for the mean over all samples.",
                stacklevel=4,
            )

    def _check_reduced(self) -> None:
        """Raises UnsupportedModelError if the wrapper's backward would not reduce a gradient."""
        own = self._distribution.is_own
        bare = [e.name for e in self._table.trainable if not own(e.parameter)]
        if bare and self._distribution.group.size > 1:
            raise UnsupportedModelError(
                f"Found trainable parameters that are not sharded: {', '.join(bare)}; expected all "
                "of them to be, since no backward reduces the others' gradients over ranks. Call "
                "fully_shard on the whole model too."
            )

    def _check_modules(self) -> None:
        ranks = self._distribution.group.size
        self._table.check_current(self._distribution.stand_ins())
        new = [
            name
            for root in self._roots
            for name, module in root.named_modules()
            if module not in self._scope and any(True for _ in module.parameters(recurse=False))
        ]
        if new:
            raise ValueError(
                f"Found modules that joined the model after the engine was created: "
                f"{', '.join(new)}; expected none. Create a new Engine."
            )
        check_modules(self._scope, batched=self._batch_dim is not None, num_ranks=ranks)


def _given_modules(
    modules: tuple[nn.Module | Iterable[nn.Module], ...],
) -> tuple[list[nn.Module], bool]:
    """The modules, and whether their descendants count too."""
    # A Sequential is an iterable as well as a module: ask for the module first.
    if len(modules) == 1 and not isinstance(modules[0], nn.Module):
        given, recursive = list(modules[0]), False
    else:
        given, recursive = list(modules), True  # type: ignore[arg-type]
    for module in given:
        if not isinstance(module, nn.Module):
            raise UnsupportedModelError(
                f"Found a {type(module).__name__} among the modules; expected nn.Modules, or one "
                "iterable of them. Pass the model, or model.modules()."
            )
    return given, recursive
