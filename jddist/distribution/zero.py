"""DeepSpeed's engine: ZeRO stages 0 to 3, which cut gradients, or the parameters too, into slices.

Its backward takes one scalar, averages over ranks and micro-steps, and takes place once in a
micro-step: a second one overwrites what stages 1 and 2 have reduced. So the weighted losses become
one scalar, and gradients that were computed here wait until ``engine.step()`` and reach the
optimizer by one backward of a linear function of the parameters.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Placement
from torch.nn.parameter import Parameter
from torch.utils.weak import WeakIdKeyDictionary

from jddist.errors import UnsupportedModelError

from ._zero_internals import TESTED, Internals, is_tested, package, unknown
from ._zero_public import SecondForward
from ._zero_refusals import check_engine, check_usable_now, warn_if_clipping_is_unset
from ._zero_stand_ins import StandIns
from .base import Distribution, check_placement
from .collectives import Group
from .whole import shape_of


class Zero(Distribution):
    """Parameters of a DeepSpeed engine.

    Args:
        engine: The engine that ``deepspeed.initialize`` returned.
        objectives: The placement of autojac's rows, or None.
        public_only: Whether to do without DeepSpeed's internals; None: only if the version is not
            one that was tested.

    Attributes:
        stage: The stage of ZeRO.
        public_only: Whether it does without the internals.

    Raises:
        UnsupportedModelError: The engine's configuration or DeepSpeed's version is not supported.
        ValueError: ``objectives`` is no placement that rows can have.
    """

    reduces_every_backward = True

    def __init__(
        self, engine: Any, objectives: Placement | None, public_only: bool | None = None
    ) -> None:
        check_engine(engine)
        # Weak, as everything here: whoever holds a distribution must not keep models alive.
        self._engine = weakref.ref(engine)
        self.stage = int(engine.zero_optimization_stage())
        self.public_only = _without_internals(self.stage) if public_only is None else public_only
        if self.public_only and self.stage == 3:
            raise _needs_internals("ZeRO-3")
        super().__init__(Group(dist.group.WORLD), objectives)
        with contextlib.suppress(UnsupportedModelError) if self.public_only else nullcontext():
            warn_if_clipping_is_unset(engine)
        self._hooks = SecondForward(engine) if self.public_only else Internals(engine)
        self._waiting: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._backward_at: int | None = None
        self._divides_by_steps = True
        self._stand_ins = weakref.ref(StandIns(engine, self))
        self.register(engine.module)

    @property
    def engine(self) -> Any:
        """The engine.

        Raises:
            RuntimeError: It is gone.
        """
        engine = self._engine()
        if engine is None:
            raise RuntimeError("Found no DeepSpeed engine any more; expected it to be kept alive.")
        return engine

    @property
    def methods(self) -> StandIns:
        """What stands in for the engine's methods.

        Raises:
            RuntimeError: The engine was detached.
        """
        found = self._stand_ins()
        if found is None:
            raise RuntimeError(
                "Found a DeepSpeed engine that was detached; expected an attached one. Call "
                "jddist.attach(model_engine) again, and create a new Engine."
            )
        return found

    def is_of(self, engine: Any) -> bool:
        """Whether these are the parameters of ``engine``."""
        return self._engine() is engine

    def restate(self, objectives: Placement | None) -> None:
        """Takes another statement of where rows live."""
        if objectives is not None:
            self.objectives = check_placement(objectives)

    def detach(self) -> None:
        """Undoes ``attach``: the engine is as it was. Gradients that wait for its step are lost."""
        self._hooks.release()
        methods = self._stand_ins()
        if methods is not None:
            methods.restore()
        self._stand_ins = lambda: None  # type: ignore[assignment]
        self._waiting.clear()
        super().detach()

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """With ZeRO-3 every rank has to enter: all parameters are gathered, once, before anything
        else, so that it does not matter how many passes a rank takes."""
        check_usable_now(self.engine)
        if isinstance(self._hooks, SecondForward):
            yield
            return
        parameters = list(self.engine.module.parameters())
        with self._whole(parameters), self._hooks.unnoticed():
            yield

    def traced(self, output: Tensor) -> Tensor:
        if isinstance(self._hooks, SecondForward):
            return self._hooks.on_second_graph(output)
        return output

    def inside(self, tensor: Tensor) -> Tensor:
        return self._hooks.inside(tensor) if isinstance(self._hooks, Internals) else tensor

    def check_gives_rows(self) -> None:
        if self.public_only:
            raise _needs_internals("rows of the Jacobian")

    def weighted_backward(self, output: Tensor, weights: Tensor, *, retain_graph: bool) -> None:
        """The engine's own backward of the weighted sum, which it divides by the micro-steps."""
        self._check_first_in_step()
        self._original_backward(
            (output * weights).sum(),
            retain_graph=retain_graph,
            scale_wrt_gas=self._divides_by_steps,
        )
        if self.stage == 3 and isinstance(self._hooks, Internals) and not self._hooks.noticed:
            raise UnsupportedModelError(
                "Found losses that do not depend on an output of the DeepSpeed engine, of which "
                "ZeRO-3 keeps the last micro-step alone; expected losses of model_engine(inputs). "
                "Do not call model_engine.module(inputs)."
            )

    @contextmanager
    def dividing_by_steps(self, divides: bool) -> Iterator[None]:
        """Inside, what DeepSpeed calls ``scale_wrt_gas``."""
        before, self._divides_by_steps = self._divides_by_steps, divides
        try:
            yield
        finally:
            self._divides_by_steps = before

    def _check_first_in_step(self) -> None:
        """Raises RuntimeError if this micro-step has had its backward, or gradients wait."""
        self._check_no_backward_yet()
        if self._waiting:
            raise RuntimeError(
                "Found a backward while gradients of jac_to_grad or mtl_backward wait for "
                "model_engine.step(); expected one or the other, since DeepSpeed takes one "
                "backward in a micro-step. Call step() first, or make the losses further tasks."
            )

    def keeps_gradient(self, tensor: Tensor) -> bool:
        return tensor in self.names

    def keep_gradient(self, tensor: Tensor, gradient: Tensor) -> None:
        """Keeps a gradient, the same on all ranks, until the engine's step."""
        self._check_no_backward_yet()
        waiting = self._waiting.get(tensor)
        self._waiting[tensor] = gradient if waiting is None else waiting + gradient

    def hand_over(self) -> None:
        """Hands the gradients that wait over to DeepSpeed, as ``engine.step()`` does.

        Afterwards ``deepspeed.utils.safe_get_full_grad`` shows them, and no other backward may
        take place before the step. Every rank has to call.
        """
        if not self._waiting:
            return
        hooks = self._hooks
        assert isinstance(hooks, Internals)
        parameters = [p for p in self.names if p in self._waiting]
        gradients = [self._waiting[p] for p in parameters]
        self._waiting.clear()
        with self._whole(parameters):
            loss = _Linear.apply(gradients, *parameters)
            # DeepSpeed notices a backward at the outputs of forward passes, and this is none.
            loss.register_hook(lambda _: hooks.begin_backward())
            self._original_backward(loss)

    def drop_waiting(self) -> None:
        """Forgets the gradients that wait, and that there was a backward."""
        self._waiting.clear()
        self._backward_at = None

    def note_scalar_backward(self) -> None:
        """Told before a backward that is not jddist's."""
        if self._waiting:
            self._check_first_in_step()
        self._note_backward()

    def reduce_accumulated(self, parameters: Sequence[Parameter]) -> None:
        """A micro-step that is skipped counts as one with a gradient of zero."""
        self.check_gives_rows()
        for parameter in parameters:
            zeros = torch.zeros(
                shape_of(parameter), dtype=parameter.dtype, device=self.engine.device
            )
            self.keep_gradient(parameter, zeros)

    def _original_backward(self, loss: Tensor, **options: Any) -> None:
        self._note_backward()
        self.methods.original["backward"](loss, **options)

    def _note_backward(self) -> None:
        # What is not at a boundary accumulates, also where the user says so and steps only then.
        engine = self.engine
        if engine.is_gradient_accumulation_boundary() and not engine.inside_no_sync_ctxt:
            self._backward_at = engine.micro_steps

    def _check_no_backward_yet(self) -> None:
        if self._backward_at != self.engine.micro_steps:
            return
        raise RuntimeError(
            "Found another backward of the same micro-step; expected one, since DeepSpeed's stages "
            "1 and 2 keep the last alone. Call model_engine.step() after each: "
            "gradient_accumulation_steps says how many of them make an update."
        )

    @contextmanager
    def _whole(self, parameters: list[Parameter]) -> Iterator[None]:
        """Inside, the parameters are whole on every rank."""
        if self.stage < 3:
            yield
            return
        # A rank that is in another call would otherwise take part in the wrong collective.
        self.handshake("a pass over partitioned parameters", {}, {})
        # Some may be on their way already, fetched ahead for the backward.
        self.engine.optimizer.empty_partition_cache()
        with package().zero.GatheredParameters(parameters):
            yield


class _Linear(torch.autograd.Function):
    """A function of parameters that is zero, with given gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Parameter) -> Tensor:
        ctx.gradients = [g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True)]
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (scale,) = outputs
        return (None, *(g * scale.to(g.dtype) for g in ctx.gradients))


def _needs_internals(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Found {what} with a DeepSpeed engine of which jddist is to use public functions alone; "
        f"expected DeepSpeed {', '.join(TESTED)}, whose internals are known, and no "
        f'public_only=True. Install it: pip install "deepspeed=={TESTED[-1]}".'
    )


def _without_internals(stage: int) -> bool:
    """Whether this version of DeepSpeed has to be used by its public functions alone."""
    version = package().__version__
    if is_tested(version):
        return False
    if stage == 3:
        raise unknown("the internals of ZeRO-3 are not known")
    warnings.warn(
        f"Found DeepSpeed {version}; expected {', '.join(TESTED)}, whose internals jddist was "
        "tested with. Forward passes run twice, and rows of the Jacobian (mtl_backward, "
        "jac_to_grad) are not available.",
        stacklevel=2,
    )
    return True
