"""The engine: the Gramian of the Jacobian without the Jacobian, and the weighted step.

One step goes through these stages: the local pass turns the output's graph into blocks of rows;
a handshake tells every rank what the others have; the exchange turns all blocks into the global
Gramian; a weighting runs on rank 0; the weighted losses go back through the user's own backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Placement, Shard

from jddist.aggregation import Flattening, GeneralizedWeighting, Weighting
from jddist.aggregation._weightings import check_takes_gramians
from jddist.distribution.base import Distribution, check_placement, is_average, is_sharded
from jddist.distribution.counts import Count, checked_count
from jddist.distribution.fully_shard import FullyShard
from jddist.distribution.once import Job
from jddist.distribution.select import distribution_of, select, unwrap
from jddist.errors import UnsupportedModelError

from . import global_pass
from .blocks import DEFAULT_BUDGET, Scratch
from .book_keeping import Books, agreed, combined, differentiated, no_hooks
from .capture import Capture, paused
from .global_pass import GlobalLayout
from .joint import JointOutput
from .layout import OutputLayout
from .local_pass import Blocks, LocalPass
from .parameters import ParameterTable, build_table, scope_of
from .refusals import check_modules
from .row_blocks import row_blocks

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
            slower: rows are then formed in smaller tiles, or twice. 256 MiB by default.
        nonfinite: What to do if an objective or its gradient is NaN or infinite: "raise"
            NonFiniteObjectiveError on every rank, or "skip": weights of zero for that step.

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
    ) -> None:
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
            [o.module for o in self._table.owners if o.rule is None and batch_dim is not None],
        )
        scratch = Scratch(memory_budget)
        leaves = self._distribution.leaves
        self._local_pass = LocalPass(self._table, batch_dim is not None, scratch, leaves)
        # Two batches have no batch dimension in common: one backward pass per objective.
        self._joint_pass = LocalPass(self._table, False, scratch, leaves)
        self._layout: GlobalLayout | None = None
        self._dtype = torch.float32
        self._books = Books.NO
        self._skip = False
        self._warned_uneven = False

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
        layout, blocks = self.prepare("Engine.compute_gramian", output, count)
        return self._gramian(output, layout, blocks)

    def _gramian(self, output: Tensor, layout: GlobalLayout, blocks: Blocks) -> Tensor:
        parts = global_pass.gramian(self._distribution, layout, blocks, output, self._table)
        self._layout, self._skip = layout, False
        if not parts.finite:
            error = global_pass.nonfinite_error(layout, parts)
            if self._nonfinite == "raise":
                raise error
            warnings.warn(f"{error} The weights of this step are zero.", stacklevel=3)
            self._skip = True
        values = parts.values.to(torch.promote_types(output.dtype, torch.float32))
        return layout.whole.generalized(values)

    def cross_gramian(
        self,
        first: Tensor,
        second: Tensor,
        /,
        *,
        counts: tuple[Count, Count] | None = None,
    ) -> Tensor:
        """The matrix J1 J2ᵀ of two batches' objectives, as MoDo and SDMGrad need it.

        Both batches have to go through the model before this call. It takes one backward pass per
        objective, with or without a ``batch_dim``. The weights that it leads to belong to a step of
        its own: ``engine.backward(losses, weights)``.

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
        layout, blocks, infos = self._prepare("Engine.cross_gramian", (first, second), counts)
        joint = JointOutput.of(first, second, self._batch_dim)
        parts = global_pass.gramian(self._distribution, layout, blocks, joint.output, self._table)
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
        (weights,) = self._distribution.run_once([Job(weighting, gramian, shape)])
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
            retain_graph: Whether to keep the graph.

        Returns:
            The weights of all objectives.

        Raises:
            The errors of ``compute_gramian`` and ``compute_weights``; ``.grad`` is then untouched,
            and the graph may be freed.
        """
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
                gramian = self._gramian(output, layout, blocks)
                weights = self.compute_weights(gramian, weighting_or_weights)
            self._write_gradients(output, blocks, weights, retain_graph)
        finally:
            for block in blocks:
                if block is not None:
                    block.release()
        return weights

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
        if self._books is Books.NO or weights.numel() == 0:
            # The records live as long as the graph's own tensors.
            with paused() if retain_graph else nullcontext():
                output.backward(local, retain_graph=retain_graph)
        else:
            if self._books is Books.ROWS:
                gradients = combined(self._layout, blocks, entries, local)
            else:
                gradients = differentiated(self._distribution, output, entries, local)
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
        layout, blocks, _ = self._prepare(call, (output,), (count,), weights, step, retain_graph)
        return layout, blocks

    def _prepare(
        self,
        call: str,
        outputs: tuple[Tensor] | tuple[Tensor, Tensor],
        counts: tuple[Count | None, ...] | None,
        weights: Tensor | None = None,
        step: bool = False,
        retain_graph: bool = True,
    ) -> tuple[GlobalLayout, Blocks, list[dict[str, Any]]]:
        """``prepare`` for one output or for two, and what every rank told."""
        error: Exception | None = None
        books = Books.NO
        blocks: Blocks = []
        agree: dict[str, Any] = {}
        info: dict[str, Any] = {}
        by_passes = isinstance(self._distribution, FullyShard) and not is_sharded(self._placement)
        no_pass = by_passes or weights is not None
        with nullcontext() if no_pass else self._distribution.first_pass():
            try:
                layouts = [OutputLayout.of(output, self._batch_dim) for output in outputs]
                for output in outputs:
                    self._check_output(output)
                self._check_modules()
                known = [
                    self._rows_of_count(count, layout)
                    for count, layout in zip(counts or (None,) * len(outputs), layouts, strict=True)
                ]
                count = None if None in known else [c for rows in known for c in rows or ()]
                local_pass, output, layout = self._local_pass, outputs[0], layouts[0]
                if len(outputs) == 2:
                    local_pass = self._joint_pass
                    output = JointOutput.of(*outputs, self._batch_dim).output
                    layout = OutputLayout.of(output, None)
                agree = global_pass.must_agree(
                    self._table, outputs, layouts, self._placement, count is not None
                )
                if weights is not None:
                    agree["shape of the weights"] = list(weights.shape)
                elif isinstance(self._distribution, FullyShard) and by_passes:
                    self._distribution.check_takes_passes()
                    agree["parameters reached"] = local_pass.reached(output)
                    blocks = [None] * len(self._table.entries)
                else:
                    trainable = self._table.trainable
                    taken = step and self._distribution.takes_gradients(
                        {entry.parameter for entry in trainable}
                    )
                    agree["whether gradients are handed over"] = taken
                    taken = taken and no_hooks(trainable, self._scope)
                    free = taken and not retain_graph and count is None
                    blocks = local_pass.blocks(
                        output, layout, keep=taken and retain_graph, free=free
                    )
                    if taken and local_pass.accounted:
                        rows = local_pass.freed or (retain_graph and count is None)
                        books = Books.ROWS if rows else Books.GRADIENTS
                info = global_pass.to_tell(blocks, layout, count, local_pass.samples)
                info["both"] = [part.size for part in layouts]
                info["books"] = [int(books), int(local_pass.freed)]
            except Exception as failure:  # it is raised again on every rank, by the handshake
                error = failure
        infos = self._distribution.handshake(call, agree, info, error)
        self._dtype = output.dtype
        self._warn_if_uneven(infos)
        self._books = agreed([info["books"] for info in infos], books)
        rank = self._distribution.group.rank
        whole = GlobalLayout.of(layout, infos, rank, self._placement)
        if weights is None and isinstance(self._distribution, FullyShard) and by_passes:
            factor = self._distribution.backward_factor(self._placement)
            whole, blocks = row_blocks(self._distribution, whole, output, self._table, factor)
        return whole, blocks, infos

    def _check_output(self, output: Tensor) -> None:
        sharded = is_sharded(self._placement)
        if sharded and output.ndim == 0 and self._distribution.group.size > 1:
            raise ValueError(
                "Found a scalar output with objectives=Shard(0); expected a dimension along "
                "which the ranks' objectives are concatenated."
            )
        if not output.requires_grad:
            raise ValueError(
                "Found an output that does not require a gradient; expected objectives with a "
                "graph. A rank without samples passes losses[:0] of any dummy sample."
            )

    def _rows_of_count(self, count: Count | None, layout: OutputLayout) -> list[float] | None:
        counts = checked_count(count, layout.num_rows, self._placement)
        if counts is None:
            return None
        return layout.rows_of(torch.tensor(counts).view(layout.shape)).tolist()

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
