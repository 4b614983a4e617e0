"""NaN that arises on one rank on the way back alone: every rank says on which, and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from jddist._progress import progress
from jddist.aggregation import UPGradWeighting
from jddist.autogram import Engine
from jddist.autogram.blocks import OuterBlock
from jddist.autogram.own_gradients import OwnHook
from jddist.errors import NonFiniteObjectiveError
from tests._ranks import run_ranks
from tests.distributed._sharded import make_mesh, make_tied, shard
from tests.distributed._training import LOSSES, local_part, make_data, make_network, wrap

CULPRIT = 1
NAN = float("nan")


class _Spoilt(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * NAN


class _Run:
    """Something that is trained over ranks, one step after the other."""

    def __init__(self, rank: int, world_size: int, wrapper: str, objectives: str) -> None:
        self.bad = rank == CULPRIT
        self.tasks = objectives == "task"
        self.last: nn.Module
        if wrapper == "fully_shard":
            tied = make_tied()
            self.last = tied.narrow
            self.model = shard(tied, [tied.first, tied.narrow], mesh=make_mesh())
        else:
            network = make_network()
            self.last = network.last
            self.model = wrap(network, gradient_as_bucket_view=wrapper == "reducer")
        self.engine = Engine(self.model, batch_dim=None if self.tasks else 0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.x, self.y = (local_part(t, rank, world_size, "uneven") for t in make_data())
        self.count = len(self.x) if self.tasks else None

    def losses(self, spoilt: bool = False) -> Tensor:
        out = self.model(self.x)
        return LOSSES["task" if self.tasks else "instance"](
            _Spoilt.apply(out) if spoilt else out, self.y
        )

    def step(self, **options: Any) -> None:
        self.optimizer.zero_grad()
        losses = self.losses()
        self.engine.backward(losses, UPGradWeighting(), count=self.count, **options)
        self.optimizer.step()

    def bare(self, times: float) -> None:
        """A step with a backward of the user's own."""
        self.optimizer.zero_grad()
        losses = self.losses()
        gramian = self.engine.compute_gramian(losses, count=self.count)
        weights = self.engine.compute_weights(gramian, UPGradWeighting())
        losses.backward(self.engine.local_weights(weights) * times)
        self.optimizer.step()


# Spoils the gradients of one step on the culprit.
Fault = Callable[[_Run], None]


def _by_a_hook(run: _Run) -> None:
    parameter = run.last.weight
    assert isinstance(parameter, Tensor)
    handle = parameter.register_hook(lambda grad: grad * (NAN if run.bad else 1.0))
    run.step()
    handle.remove()


def _in_the_books(run: _Run) -> None:
    combine = OuterBlock.combine
    with pytest.MonkeyPatch.context() as patch:
        if run.bad:
            patch.setattr(OuterBlock, "combine", lambda block, w: combine(block, w) * NAN)
        run.step()


def _by_a_framework(run: _Run) -> None:
    times = NAN if run.bad else 1.0
    run.step(backward=lambda losses, weights: losses.backward(weights * times))


def _in_a_bare_backward(run: _Run) -> None:
    run.bare(NAN if run.bad else 1.0)


def _accumulated(run: _Run) -> None:
    run.optimizer.zero_grad()
    hooks = [p.register_hook(lambda g: g * (NAN if run.bad else 1)) for p in run.model.parameters()]
    weighting = UPGradWeighting()
    with run.engine.accumulate():
        for part in (slice(0, 1), slice(1, None)):
            losses = LOSSES["instance"](run.model(run.x[part]), run.y[part])
            run.engine.backward(losses, weighting)
    for hook in hooks:
        hook.remove()
    run.optimizer.step()


CASES: list[tuple[str, str, Fault, str]] = [
    ("ddp", "instance", _by_a_hook, "last.weight"),
    ("ddp", "task", _by_a_hook, "last.weight"),
    ("reducer", "instance", _by_a_hook, "last.weight"),
    ("ddp", "instance", _in_the_books, "first.weight"),
    ("ddp", "instance", _by_a_framework, "last.weight"),
    ("ddp", "instance", _in_a_bare_backward, "last.weight"),
    ("reducer", "task", _in_a_bare_backward, "last.weight"),
    ("ddp", "instance", _accumulated, "last.weight"),
    ("fully_shard", "instance", _in_a_bare_backward, "last.weight"),
    ("fully_shard", "task", _in_a_bare_backward, "last.weight"),
    ("fully_shard", "instance", _by_a_framework, "last.weight"),
]


def _run(rank: int, world_size: int) -> list[list[str]]:
    found = []
    for wrapper, objectives, fault, _ in CASES:
        run = _Run(rank, world_size, wrapper, objectives)
        run.step()
        run.bare(1.0)
        spoilt = progress.step + (progress.stage == "backward")
        fault(run)
        message = ""
        try:
            run.step()
        except NonFiniteObjectiveError as error:
            message = str(error)
        found.append([message, f"rank {CULPRIT}, whose own gradient was not finite in step "])
        found[-1][1] += f"{spoilt}, backward"
        hooks = [h for p in run.model.parameters() for h in (p._backward_hooks or {}).values()]
        assert not any(isinstance(hook, OwnHook) for hook in hooks)
    return found


def _spoil_the_first_pass(rank: int, world_size: int) -> list[tuple[str, bool]]:
    """The losses are finite, their gradients are not: that is known before ``.grad`` is."""
    found = []
    for wrapper in ("ddp", "fully_shard"):
        for objectives in ("instance", "task"):
            run = _Run(rank, world_size, wrapper, objectives)
            losses = run.losses(spoilt=run.bad)
            assert bool(losses.isfinite().all())
            message = ""
            try:
                run.engine.backward(losses, UPGradWeighting(), count=run.count)
            except NonFiniteObjectiveError as error:
                message = str(error)
            found.append((message, all(p.grad is None for p in run.model.parameters())))
    return found


def _everything(rank: int, world_size: int) -> tuple[list[list[str]], list[tuple[str, bool]]]:
    return _run(rank, world_size), _spoil_the_first_pass(rank, world_size)


@pytest.mark.parametrize(
    "world_size", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))]
)
def test_every_rank_names_the_one_whose_gradient_was_nan(world_size: int) -> None:
    for later, at_once in run_ranks(_everything, world_size):
        for (wrapper, objectives, fault, parameter), (message, expected) in zip(
            CASES, later, strict=True
        ):
            case = (wrapper, objectives, fault.__name__)
            assert expected in message, (case, message)
            assert f"(of {parameter}" in message or f", {parameter}" in message, (case, message)
            assert message.count("whose own gradient") == 1, (case, message)
        for message, untouched in at_once:
            assert untouched
            places = message.partition(", or in its gradient")[0].removeprefix("Found ")
            assert places.count("(rank") >= 2, message
            assert places.count("(rank") == places.count(f"(rank {CULPRIT})"), message


def _notes(rank: int, world_size: int) -> list[str]:
    """What was finite names nobody, and what is not kept any more neither."""
    run = _Run(rank, world_size, "ddp", "instance")
    messages = []
    for steps in (1, 20):
        handle = run.last.weight.register_hook(lambda grad: grad * (NAN if run.bad else 1.0))  # type: ignore[union-attr]
        if steps == 20:
            run.engine.backward(run.losses(), UPGradWeighting())
            run.optimizer.zero_grad()
        handle.remove()
        for _ in range(steps):
            run.step()
        try:
            run.engine.backward(run.losses() * NAN, UPGradWeighting())
        except NonFiniteObjectiveError as error:
            messages.append(str(error))
    return messages


def test_a_cause_is_named_only_where_there_was_one() -> None:
    for messages in run_ranks(_notes, 2):
        assert len(messages) == 2
        assert not any("whose own gradient" in message for message in messages), messages


def test_engines_do_not_keep_hooks_alive_nor_mind_their_own() -> None:
    from jddist.autogram.book_keeping import no_hooks
    from jddist.autogram.own_gradients import OwnGradients

    layer = nn.Linear(3, 2)
    engine = Engine(layer, batch_dim=0, objectives=Shard(0))
    own = OwnGradients()
    own.watch({"weight": layer.weight, "bias": layer.bias})
    assert len(layer.weight._backward_hooks or {}) == 1
    assert no_hooks(engine.table.trainable, [layer])
    (layer(torch.randn(4, 3)) * torch.tensor([1.0, torch.inf])).sum().backward()
    assert own.found() is not None and own.found()[1] == ["bias", "weight"]  # type: ignore[index]
    del own
    assert not layer.weight._backward_hooks
    handle = layer.weight.register_hook(lambda grad: grad)
    assert not no_hooks(engine.table.trainable, [layer])
    handle.remove()
