"""World-size invariance, inherited by every strategy that shards parameters: a matrix of cases.

A ``Setup`` places a model as its strategy does; each case trains it and is compared with one
process on the whole batch. Starting processes is what takes time here, so all the cases of one
setup share one start. The bound 1e-10 is the project's: rounding in float64 stays near 1e-15 a
step, and five steps of an optimizer multiply it by far less than the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard

from jddist import attach, verify
from jddist.aggregation import UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autojac import backward, jac, jac_to_grad, jac_to_grad_groups, mtl_backward
from jddist.grouping import per_layer
from tests._oracle import gramian as oracle_gramian
from tests._oracle import relative_error
from tests.distributed import _every_method as every_method
from tests.distributed._methods import METHODS, state_losses
from tests.distributed._sharded import (
    assign,
    make_tied,
    rows_of,
    whole,
    whole_gradients,
    whole_parameters,
)
from tests.distributed._training import (
    LOSSES,
    OPTIMIZERS,
    STEPS,
    TASKS,
    local_part,
    make_data,
    make_network,
    upgrad_for,
)
from tests.distributed.test_task_invariance import MultiTask
from tests.distributed.test_task_invariance import _labelled as labelled_of
from tests.distributed.test_task_invariance import _losses as task_losses
from tests.distributed.test_task_invariance import _model as make_multi_task

BOUND = 1e-10
MAX_NORM = 0.5
STATED = torch.arange(1.0, TASKS + 1.0, dtype=torch.float64)  # losses, for who wants to know

Found = dict[str, list[Tensor]]

# Which objectives, model, optimizer and reshard_after_forward go together.
ENGINE_CASES = {
    "instance, reshard": ("instance", make_network, "adamw", True),
    "instance, keep": ("instance", make_network, "sgd", False),
    "instance, awkward": ("instance", make_tied, "sgd", None),
    "instance x task": ("instance x task", make_tied, "adamw", None),
    "task x instance": ("task x instance", make_network, "sgd", True),
    "task, reshard": ("task", make_tied, "adamw", True),
    "task, keep": ("task", make_network, "sgd", False),
    "task sum": ("task sum", make_tied, "sgd", None),
}


class Setup(ABC):
    """How one strategy places models on this rank.

    Args:
        rank: This rank, among those over which the objectives are spread.
        world_size: The number of those.
        kind: How the batch is split over them.
    """

    divide_factors: tuple[float | None, ...] = (None,)
    """The divisors of gradients to try; None for the strategy's own."""

    places_gradients = True
    """Whether a backward of the user's own leaves gradients where the parameters are."""

    def __init__(self, rank: int, world_size: int, kind: str) -> None:
        self.rank, self.world_size, self.kind = rank, world_size, kind

    def part(self, tensor: Tensor) -> Tensor:
        """This rank's part of a batch."""
        return local_part(tensor, self.rank, self.world_size, self.kind)

    @abstractmethod
    def place(self, model: nn.Module, *, reshard: bool | None = None) -> nn.Module:
        """Distributes a model."""

    @abstractmethod
    def place_tasks(self, model: MultiTask, *, heads: bool) -> nn.Module:
        """Distributes the trunk of a model with a head for each task, and its heads or not."""

    def sync(self, model: nn.Module, on: bool) -> None:
        """Whether the next backward of a placed model reduces gradients."""
        return None

    def divide_by(self, model: nn.Module, factor: float) -> None:
        """Sets the divisor of gradients of a placed model."""
        raise NotImplementedError


def _batch_dim(objective: str) -> int | None:
    return {"instance": 0, "instance x task": 0, "task x instance": 1}.get(objective)


def _train_engine(setup: Setup, case: str) -> Found:
    objective, make, optimizer, reshard = ENGINE_CASES[case]
    model = setup.place(make(), reshard=reshard)
    x, y = (setup.part(t) for t in make_data())
    placement = Partial("sum") if objective == "task sum" else None
    engine = Engine(model, batch_dim=_batch_dim(objective), objectives=placement)
    count = len(x) if objective == "task" else None
    opt = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    found: Found = {"gramians": [], "weights": [], "parameters": []}
    for step in range(STEPS):
        losses = LOSSES[objective](model(x), y)
        opt.zero_grad()
        if step % 2 == 0:
            weights = engine.backward(losses, upgrad_for(losses), count=count)
        else:
            gramian = engine.compute_gramian(losses, count=count)
            found["gramians"].append(gramian)
            weights = engine.compute_weights(gramian, upgrad_for(losses))
            losses.backward(engine.local_weights(weights))
        whole_gradients(model, placed=setup.places_gradients or step % 2 == 0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        opt.step()
        found["weights"].append(weights)
        found["parameters"].append(whole_parameters(model))
    return found


def _engine_reference(case: str) -> Found:
    objective, make, optimizer, _ = ENGINE_CASES[case]
    model, (x, y) = make(), make_data()
    opt = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    expected: Found = {"gramians": [], "weights": [], "parameters": []}
    for step in range(STEPS):
        losses = LOSSES[objective](model(x), y)
        if step % 2:
            expected["gramians"].append(oracle_gramian(losses, model.parameters()))
        rows = rows_of(losses, model)
        weights = UPGradWeighting()(rows @ rows.T)
        assign(model, weights @ rows)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        opt.step()
        expected["weights"].append(weights.view(losses.shape))
        expected["parameters"].append(whole_parameters(model))
    return expected


def _accumulate(setup: Setup) -> Found:
    """Micro-steps without gradient sync, and a divisor of the user's own."""
    found: Found = {"gradient": []}
    for factor in (None, 3.0):
        model = setup.place(make_network())
        if factor in setup.divide_factors and factor is not None:
            setup.divide_by(model, factor)
        engine = Engine(model, batch_dim=0, nonfinite="skip")
        x, y = make_data()
        for start, on in ((0, False), (4, True)):
            setup.sync(model, on)
            bx, by = (setup.part(t[start:]) for t in (x, y))
            engine.backward(LOSSES["instance"](model(bx), by), UPGradWeighting())
        found["gradient"].append(whole_gradients(model))
    return found


def _accumulate_reference() -> Found:
    model, (x, y) = make_network(), make_data()
    total = torch.zeros(())
    for start in (0, 4):
        rows = rows_of(LOSSES["instance"](model(x[start:]), y[start:]), model)
        total = total + UPGradWeighting()(rows @ rows.T) @ rows
    return {"gradient": [total, total]}


def _train_tasks(setup: Setup, how: str) -> Found:
    """``mtl_backward`` with heads that are sharded, or are not and are reduced all the same."""
    model = make_multi_task()
    setup.place_tasks(model, heads=how == "sharded heads")
    attach(model)
    x, y = make_data()
    labelled = setup.part(labelled_of(y))
    x, y = (setup.part(t) for t in (x, y))
    trunk, heads = list(model.trunk.parameters()), list(model.heads.parameters())
    opts = [OPTIMIZERS["adamw"](trunk), OPTIMIZERS["adamw"](heads)]
    found: Found = {"weights": [], "parameters": []}
    for _ in range(STEPS):
        features, outputs = model(x)
        counts = labelled.sum(dim=0).tolist()
        losses = task_losses(outputs, y, labelled)
        # Without samples neither the loss nor its gradient need be numbers.
        losses = [
            loss if n else loss * float("nan") for loss, n in zip(losses, counts, strict=True)
        ]
        mtl_backward(losses, features=features, count=counts)
        for p in trunk:
            assert isinstance(p.jac, DTensor) and p.jac.shape == (TASKS, *p.shape)
        found["weights"].append(jac_to_grad(model.trunk.parameters(), UPGrad()))
        for opt in opts:
            opt.step()
            opt.zero_grad()
        found["parameters"].append(whole_parameters(model))
    return found


def _tasks_reference() -> Found:
    model, (x, y) = make_multi_task(), make_data()
    opt = OPTIMIZERS["adamw"](list(model.parameters()))
    expected: Found = {"weights": [], "parameters": []}
    for _ in range(STEPS):
        losses = torch.stack(task_losses(model(x)[1], y, labelled_of(y)))
        rows = rows_of(losses, model.trunk)
        own = rows_of(losses.sum().unsqueeze(0), model.heads)[0]
        weights = UPGrad().gramian_weighting(rows @ rows.T)
        assign(model.trunk, weights @ rows)
        assign(model.heads, own)
        opt.step()
        expected["weights"].append(weights)
        expected["parameters"].append(whole_parameters(model))
    return expected


def _rows(setup: Setup) -> Found:
    """Rows with either placement, every aggregator on them, and groups."""
    model = setup.place(make_tied(), reshard=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    x, y = (setup.part(t) for t in make_data())
    found: Found = {}
    distribution = attach(model, objectives=Partial("sum"))
    losses = list(LOSSES["task sum"](model(x), y))
    found["jac, tasks"] = [whole(j) for j in jac(losses, trained, retain_graph=True)]
    backward(losses, retain_graph=True)
    found[".jac, tasks"] = [whole(p.jac) for p in trained]
    for name, method in METHODS.items():
        torch.manual_seed(5)
        aggregator = method.make()
        state_losses(aggregator, STATED)
        jac_to_grad(trained, aggregator, retain_jac=True)
        found[name] = [whole_gradients(model)]
        model.zero_grad()
    groups = per_layer(model)
    weights = jac_to_grad_groups(groups, [UPGrad() for _ in groups])
    found["groups"] = [whole_gradients(model), *weights]
    model.zero_grad()
    distribution.detach()
    attach(model, objectives=Shard(0))
    backward(LOSSES["instance"](model(x), y), UPGrad())
    found["instances"] = [whole_gradients(model)]
    model.zero_grad()
    errors = verify(model, lambda: LOSSES["instance"](model(x), y), batch_dim=0)
    found["verify"] = [torch.tensor(list(errors.values()))]
    return found


def _rows_reference() -> Found:
    model, (x, y) = make_tied(), make_data()
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = rows_of(LOSSES["task sum"](model(x), y), model)
    parts = rows.split([p.numel() for p in trained], dim=1)
    shaped = [part.view(TASKS, *p.shape) for p, part in zip(trained, parts, strict=True)]
    expected: Found = {"jac, tasks": shaped, ".jac, tasks": shaped}
    for name, method in METHODS.items():
        torch.manual_seed(5)
        aggregator = method.make()
        state_losses(aggregator, STATED)
        expected[name] = [aggregator(rows)]
    groups = per_layer(model)
    columns = dict(zip(trained, parts, strict=True))
    matrices = [torch.cat([columns[p] for p in group], dim=1) for group in groups]
    weights = [UPGrad().gramian_weighting(g @ g.T) for g in matrices]
    vectors = [w @ g for w, g in zip(weights, matrices, strict=True)]
    expected["groups"] = [torch.cat(vectors), *weights]
    instances = rows_of(LOSSES["instance"](model(x), y), model)
    expected["instances"] = [UPGrad()(instances)]
    return expected


CASES: dict[str, tuple[Callable[[Setup], Found], Callable[[], Found]]] = {
    **{
        case: (partial(_train_engine, case=case), partial(_engine_reference, case))
        for case in ENGINE_CASES
    },
    "accumulation": (_accumulate, _accumulate_reference),
    "sharded heads": (partial(_train_tasks, how="sharded heads"), _tasks_reference),
    "plain heads": (partial(_train_tasks, how="plain heads"), _tasks_reference),
    "rows": (_rows, _rows_reference),
    **{
        f"every method, {kind}": (
            partial(every_method.train_together, kind=kind),
            partial(every_method.reference_together, kind),
        )
        for kind in every_method.KINDS
    },
    **{
        f"two batches, {name}": (
            partial(every_method.train_on_two_batches, name=name),
            partial(every_method.reference_of_two_batches, name),
        )
        for name in every_method.TWO_BATCHES
    },
}


def run_cases(setup: Setup, left_out: Collection[str] = ()) -> dict[str, Found]:
    """What this rank finds in every case."""
    return {name: run(setup) for name, (run, _) in CASES.items() if name not in left_out}


def check_cases(ranks: list[dict[str, Found]]) -> None:
    """Compares every rank's results with one process, and with each other."""
    for case in ranks[0]:
        check_same(case, [rank[case] for rank in ranks], CASES[case][1]())
    if "rows" in ranks[0]:
        assert float(ranks[0]["rows"]["verify"][0].max()) <= BOUND


def check_same(case: str, ranks: list[Found], expected: Found) -> None:
    """Compares what every rank found in a case with one process, and with each other."""
    for found in ranks:
        for name, values in expected.items():
            for i, (got, want) in enumerate(zip(found[name], values, strict=True)):
                assert relative_error(got, want) <= BOUND, (case, name, i)
                # Bit-identical, not merely close.
                assert torch.equal(got, ranks[0][name][i]), (case, name, i)
