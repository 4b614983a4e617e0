"""What must not go wrong in silence with DeepSpeed, on the ranks of one start for all tests."""

from __future__ import annotations

import contextlib
import gc
import io
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import jddist
from jddist.aggregation import GradVacWeighting, UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autojac import backward
from tests._oracle import jacobian
from tests._ranks import run_ranks
from tests.distributed._deepspeed import (
    deepspeed_ready,
    make_engine,
    whole_gradients,
    whole_parameters,
)
from tests.distributed._training import LOSSES, local_part, make_data, make_network, parameters_of

pytest.importorskip("deepspeed", reason='needs DeepSpeed: pip install "jddist[deepspeed]"')

STAGES = (0, 1, 2, 3)


def _attached(stage: int, model: nn.Module | None = None, **config: Any) -> tuple[Any, Any]:
    engine = make_engine((model or make_network()).float(), stage, **config)
    return engine, jddist.attach(engine, weighting=UPGradWeighting(), batch_dim=0)


def _losses(engine: Any, rank: int, roll: int = 0) -> Tensor:
    parts = [
        local_part(t.roll(roll, 0), rank, dist.get_world_size(), "uneven") for t in make_data()
    ]
    x, y = (part.to(next(engine.module.parameters()).dtype) for part in parts)
    return LOSSES["instance"](engine(x), y)


def _message(call: Callable[[], Any]) -> str:
    """The error of a call that has to fail."""
    try:
        call()
    except Exception as error:  # its type is part of what is returned
        return f"{type(error).__name__}: {error}"
    return "no error"


def _warnings(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in found if "deprecated" not in str(w.message)]


def _second_backward(rank: int) -> list[str]:
    found = []
    for stage in (1, 3):
        engine, attached = _attached(stage)
        engine.backward(_losses(engine, rank))
        losses = _losses(engine, rank)
        found.append(_message(lambda engine=engine, losses=losses: engine.backward(losses)))
        engine.step()
        engine.backward(_losses(engine, rank))  # the next micro-step is free again
        engine.zero_grad()
        engine.backward(_losses(engine, rank))
        attached.detach()
    return found


def _boundaries_by_hand(rank: int) -> list[list[Tensor]]:
    """Micro-steps that DeepSpeed counts, and those of a user who steps only at the boundary."""
    found = []
    for stage in STAGES:
        results = []
        for by_hand in (False, True):
            engine, attached = _attached(stage, steps=2)
            for step in range(4):
                if by_hand:
                    engine.set_gradient_accumulation_boundary(step % 2 == 1)
                engine.backward(_losses(engine, rank, roll=step))
                if not by_hand or step % 2 == 1:
                    engine.step()
            results.append(whole_parameters(engine))
            attached.detach()
        found.append(results)
    return found


def _one_by_one(rank: int) -> list[list[Tensor]]:
    """The engine's backward, and Gramian, weights and ``losses.backward`` one after the other."""
    found = []
    for stage in (1, 2, 3):
        results = []
        for at_once in (True, False):
            model_engine = make_engine(make_network().float(), stage, steps=2)
            engine = Engine(model_engine, batch_dim=0)
            for step in range(2):
                losses = _losses(model_engine, rank, roll=step)
                if at_once:
                    engine.backward(losses, UPGradWeighting())
                else:
                    weights = engine.compute_weights(
                        engine.compute_gramian(losses), UPGradWeighting()
                    )
                    losses.backward(engine.local_weights(weights))
                model_engine.step()
            results.append(whole_parameters(model_engine))
            engine.distribution.detach()
        found.append(results)
    return found


def _verified(rank: int) -> list[float]:
    found = []
    for stage in STAGES:
        engine, attached = _attached(stage)
        errors = jddist.verify(engine, lambda e=engine: _losses(e, rank), batch_dim=0)
        assert len(errors) == 4, errors
        found.append(max(errors.values()))
        attached.detach()
    return found


def _gradients_that_wait(rank: int) -> list[str]:
    engine, attached = _attached(2)
    jddist.attach(engine, objectives=Shard(0))
    backward(_losses(engine, rank), UPGrad())
    found = [_message(lambda: engine.backward(_losses(engine, rank)))]
    found.append(_message(lambda: engine.backward(_losses(engine, rank).sum())))
    engine.zero_grad()
    engine.backward(_losses(engine, rank).sum())
    found.append(_message(lambda: backward(_losses(engine, rank), UPGrad())))
    attached.detach()
    return found


def _inner_module(rank: int) -> list[str]:
    found = []
    for stage in STAGES:
        engine, attached = _attached(stage)
        x, y = (local_part(t, rank, dist.get_world_size(), "even").float() for t in make_data())
        engine(x)
        losses = LOSSES["instance"](engine.module(x), y)
        found.append(_message(lambda losses=losses, engine=engine: engine.backward(losses)))
        attached.detach()
    return found


def _early_forward(rank: int) -> list[str]:
    found = []
    for stage in STAGES:
        engine = make_engine(make_network().float(), stage)
        losses = _losses(engine, rank)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no records: rows would be computed directly
            jddist.attach(engine, weighting=UPGradWeighting(), batch_dim=0)
            found.append(_message(lambda losses=losses, engine=engine: engine.backward(losses)))
    return found


def _hooks(engine: Any) -> list[int]:
    return [len(h) for m in engine.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]


def _detach(rank: int) -> list[str]:
    found = []
    for stage in STAGES:
        engine = make_engine(make_network().float(), stage)
        before, hooks = dict(engine.__dict__), _hooks(engine)
        attached = jddist.attach(engine, weighting=UPGradWeighting(), batch_dim=0)
        engine.backward(_losses(engine, rank))
        engine.step()
        attached.detach()
        gc.collect()  # the jddist.Engine behind engine.backward lets go of its hooks
        changed = {k for k in engine.__dict__.keys() ^ before.keys() if k in ("backward", "step")}
        assert not changed and set(engine.__dict__) == set(before), engine.__dict__.keys() ^ before
        assert _hooks(engine) == hooks
        found.append(_message(lambda engine=engine: engine.backward(_losses(engine, rank))))
    return found


def _scalar(rank: int) -> list[Tensor]:
    """A scalar gives what it gives without jddist, after a vector step and after validation."""
    found = []
    for stage in STAGES:
        plain, (engine, attached) = make_engine(make_network().float(), stage), _attached(stage)
        for roll in range(2):
            for one in (plain, engine):
                one.eval()
                with torch.no_grad():
                    _losses(one, rank)
                one.train()
                one.backward(_losses(one, rank, roll).sum())
                one.step()
        found.append(whole_parameters(engine) - whole_parameters(plain))
        attached.detach()
    return found


def _clipping(rank: int) -> list[list[str]]:
    silent = make_engine(make_network().float(), 1)
    unset = make_engine(make_network().float(), 1, gradient_clipping=None)
    return [
        _warnings(lambda: jddist.attach(silent)),
        _warnings(lambda: jddist.attach(unset)),
        _warnings(lambda: Engine(make_engine(make_network().float(), 3, gradient_clipping=None),
                                 batch_dim=0)),
    ]  # fmt: skip


def _not_finite(rank: int) -> list[Any]:
    """An objective that is NaN on one rank; the step is not taken, and the next one is."""
    found: list[Any] = []
    for stage in STAGES:
        engine, attached = _attached(stage)
        losses = _losses(engine, rank)
        broken = losses * torch.where(torch.arange(len(losses)) == 0, torch.nan, 1.0)
        broken = broken if rank == 1 else losses
        found.append(_message(lambda engine=engine, broken=broken: engine.backward(broken)))
        start = whole_parameters(engine)
        engine.backward(_losses(engine, rank))
        engine.step()
        found += [
            bool(whole_parameters(engine).isfinite().all()),
            bool((whole_parameters(engine) != start).any()),
        ]
        attached.detach()
    return found


def _skipped(rank: int) -> list[Any]:
    from jddist.integrations.deepspeed import attach

    found: list[Any] = []
    for stage in STAGES:
        engine = make_engine(make_network().float(), stage)
        attached = attach(engine, weighting=UPGradWeighting(), batch_dim=0, nonfinite="skip")
        start = whole_parameters(engine)
        losses = _losses(engine, rank) * (torch.nan if rank == 1 else 1.0)
        said = _warnings(lambda engine=engine, losses=losses: engine.backward(losses))
        engine.step()
        found += [
            len([s for s in said if "are zero" in s]),
            torch.equal(whole_parameters(engine), start),
        ]
        attached.detach()
    return found


def _failures(rank: int) -> list[str]:
    found = []

    def broken(gramian: Tensor) -> Tensor:
        raise ArithmeticError("no weights today")

    for stage in (0, 3):
        engine = make_engine(make_network().float(), stage)
        attached = jddist.attach(engine, weighting=broken, batch_dim=0)
        losses = _losses(engine, rank)
        found.append(_message(lambda engine=engine, losses=losses: engine.backward(losses)))
        attached.detach()
        engine, attached = _attached(stage)
        wrong = _losses(engine, rank)
        wrong = wrong.detach() if rank == 0 else wrong  # fails before the exchange
        found.append(_message(lambda engine=engine, wrong=wrong: engine.backward(wrong)))
        matrix = _losses(engine, rank)
        matrix = matrix.unsqueeze(1) if rank == 1 else matrix
        found.append(_message(lambda engine=engine, matrix=matrix: engine.backward(matrix)))
        jddist.attach(engine, objectives=Shard(0))
        losses = _losses(engine, rank)
        size = 0 if rank == 0 else None
        found.append(
            _message(
                lambda losses=losses, size=size: backward(
                    losses, UPGrad(), parallel_chunk_size=size
                )
            )
        )
        engine.backward(_losses(engine, rank))  # and nothing is out of step
        engine.step()
        attached.detach()
    return found


# What an engine answers if it is configured in a way that is refused, and what the error names.
REFUSED: dict[str, tuple[Any, str]] = {
    "fp16_enabled": (lambda: True, "bf16"),
    "torch_autocast_enabled": (lambda: True, "bf16"),
    "gradient_average": (False, "gradient_allreduce_op"),
    "managed_gradient_accumulation": (lambda: False, "managed_gradient_accumulation"),
    "zero_hpz_partition_size": (lambda: 2, "ZeRO++"),
    "zero_quantized_weights": (lambda: True, "ZeRO++"),
    "zero_quantized_gradients": (lambda: True, "ZeRO++"),
    "optimizer_name": (lambda: "OneBitAdam", "compresses"),
    "has_moe_layers": (True, "mixture-of-experts"),
    "sequence_parallel_size": (2, "parallelism"),
    "_is_compiled": (True, "engine.compile()"),
    "optimizer": (None, "no optimizer"),
}


def _refused(rank: int) -> dict[str, str]:
    engine = make_engine(make_network().float(), 1)
    found = {}
    for name, (answer, _) in REFUSED.items():
        before = engine.__dict__.copy()
        engine.__dict__[name] = answer
        found[name] = _message(lambda: jddist.attach(engine))
        engine.__dict__.clear()
        engine.__dict__.update(before)
    engine, attached = _attached(1)
    losses = _losses(engine, rank)
    engine._is_compiled = True
    found["compiled later"] = _message(lambda: engine.backward(losses))
    attached.detach()
    found["accumulate"] = _message(lambda: _accumulate(rank))
    return found


def _accumulate(rank: int) -> None:
    with Engine(make_engine(make_network().float(), 1), batch_dim=0).accumulate():
        pass


def _missing(rank: int) -> dict[str, str]:
    """Attributes of DeepSpeed that have another name in a version to come."""
    found = {}
    plain = make_engine(make_network().float(), 3)
    for holder, name in (
        (plain, "_backward_prologue"),
        (plain.optimizer.parameter_offload, "forward_hooks"),
        (plain._config, "_param_dict"),
    ):
        kind = type(holder)
        if name in kind.__dict__:
            value = kind.__dict__[name]
            delattr(kind, name)
            found[name] = _message(lambda: jddist.attach(plain))
            setattr(kind, name, value)
        else:
            value = holder.__dict__.pop(name)
            found[name] = _message(lambda: jddist.attach(plain))
            holder.__dict__[name] = value
    from deepspeed.runtime import utils

    engine, attached = _attached(3)
    manager = utils.OutputBackwardHookManager
    original = manager.register_hooks_on_outputs

    def renamed(self: Any, outputs: Any) -> None:
        original(self, outputs)
        del outputs._backward_hook_managers

    manager.register_hooks_on_outputs = renamed
    found["_backward_hook_managers"] = _message(lambda: _losses(engine, rank))
    manager.register_hooks_on_outputs = original
    losses = _losses(engine, rank)
    for name in ("applied_pre_backward_ref_cnt", "ds_grads_remaining"):
        value = engine.module.__dict__.pop(name)
        found[name] = _message(lambda: engine.backward(losses))
        engine.module.__dict__[name] = value
    engine.backward(losses)
    engine.step()
    attached.detach()
    return found


def _other_version(rank: int) -> dict[str, Any]:
    import deepspeed

    version, deepspeed.__version__ = deepspeed.__version__, "0.21.0"
    engines = [make_engine(make_network().float(), stage) for stage in (1, 3)]
    try:
        said = _warnings(lambda: jddist.attach(engines[0]))
        return {"stage 1": said, "stage 3": _message(lambda: jddist.attach(engines[1]))}
    finally:
        deepspeed.__version__ = version


class Dropping(nn.Module):
    """A network with dropout and a mapping for an output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_network()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"out": self.inner(self.dropout(x)), "note": "a note"}


def _public(rank: int) -> list[list[Tensor]]:
    """The public way against the other one, with the same dropout."""
    from jddist.integrations.deepspeed import attach

    found = []
    for stage in (0, 1, 2):
        results = []
        for public_only in (False, True):
            torch.manual_seed(5 + rank)
            engine = make_engine(Dropping().float(), stage, steps=2)
            attached = attach(
                engine, weighting=UPGradWeighting(), batch_dim=0, public_only=public_only
            )
            weights = []
            for roll in range(4):
                x, y = (local_part(t.roll(roll, 0), rank, 2, "uneven").float() for t in make_data())
                losses = LOSSES["instance"](engine(x)["out"], y)
                weights.append(engine.backward(losses))
                engine.step()
            attached.detach()
            results.append(torch.cat([torch.stack(weights).reshape(-1), whole_parameters(engine)]))
        found.append(results)
    return found


def _public_refusals(rank: int) -> list[str]:
    from jddist.integrations.deepspeed import attach

    engine = make_engine(make_network().float(), 1)
    attach(engine, public_only=True, objectives=Shard(0))
    losses = _losses(engine, rank)
    partitioned = make_engine(make_network().float(), 3)
    return [
        _message(lambda: backward(losses, UPGrad())),
        _message(lambda: attach(partitioned, public_only=True)),
    ]


FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
# Stages, and in which precision gradients are added up: stage 1 has an optimizer of its own for it.
HALF_PRECISION: list[tuple[int, dict[str, Any]]] = [
    *((stage, {}) for stage in STAGES),
    *((stage, FP32) for stage in (1, 2, 3)),
]


def _half_precision(rank: int) -> list[dict[str, Tensor]]:
    """Gramian, weights and parameters of one step in bfloat16."""
    found = []
    for stage, more in HALF_PRECISION:
        engine, attached = _attached(stage, bf16={"enabled": True}, **more)
        gramian = Engine(engine, batch_dim=0).compute_gramian(_losses(engine, rank))
        weights = engine.backward(_losses(engine, rank))
        engine.step()
        result = {"gramian": gramian, "weights": weights, "parameters": whole_parameters(engine)}
        found.append(result)
        attached.detach()
    return found


def _tasks_in_half_precision(rank: int) -> list[Tensor]:
    """Two micro-steps with the same batch, which are worth one."""
    found = []
    for stage, more in HALF_PRECISION:
        engine = make_engine(make_network().float(), stage, steps=2, bf16={"enabled": True}, **more)
        attached = jddist.attach(engine, objectives=Shard(0))
        for _ in range(2):
            backward(_losses(engine, rank), UPGrad())
            engine.step()
        found.append(whole_parameters(engine))
        attached.detach()
    return found


def _pipeline(rank: int) -> str:
    from deepspeed.pipe import PipelineModule

    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    with contextlib.redirect_stdout(io.StringIO()):
        pipeline = PipelineModule(layers=layers, num_stages=2, loss_fn=nn.MSELoss())
    return _message(lambda: jddist.attach(make_engine(pipeline, 1)))


class Checkpointed(nn.Module):
    """A network whose inner layers are recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_network()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner
        hidden = torch.tanh(inner.norm(inner.first(x)))
        again = checkpoint(inner.twice, hidden, use_reentrant=False)
        return inner.last(torch.tanh(inner.twice(torch.tanh(again))))


def _checkpointed(rank: int) -> list[Tensor]:
    """Recomputed layers, with ZeRO-3 in its defaults and strict: gradients of one step."""
    found = []
    defaults = {
        "stage3_param_persistence_threshold": 100000,
        "stage3_max_live_parameters": 1000000000,
        "stage3_max_reuse_distance": 1000000000,
        "stage3_prefetch_bucket_size": 50000000,
    }
    still = {"type": "SGD", "params": {"lr": 0.0}}
    # With the last one, some parameters are on their way when the forward ends.
    ahead = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    for zero in (
        {},
        defaults,
        {**defaults, "stage3_param_persistence_threshold": 10},
        {**defaults, **ahead},
    ):
        engine, attached = _attached(3, Checkpointed(), zero=zero, optimizer=still)
        for _ in range(4):  # ZeRO-3 fetches ahead once it has seen two
            engine.backward(_losses(engine, rank))
            found.append(whole_gradients(engine))
            engine.step()
        attached.detach()
    return found


def _steps(engine: Any, rank: int, steps: Iterable[int]) -> None:
    for step in steps:
        torch.manual_seed(step)  # GradVac draws an order
        engine.backward(_losses(engine, rank, roll=step))
        engine.step()


def _resume(rank: int, directory: str) -> list[list[Tensor]]:
    """Two steps, and after a checkpoint two more; by the same engine, by one that loads the
    weighting's state, and by one that does not."""
    found = []
    for stage in STAGES:
        results = []
        for loads in (None, True, False):
            engine = make_engine(make_network().float(), stage)
            weighting = GradVacWeighting()
            attached = jddist.attach(engine, weighting=weighting, batch_dim=0)
            if loads is None:
                _steps(engine, rank, range(2))
                state = {"weighting": weighting.state_dict()}
                engine.save_checkpoint(directory, tag=f"stage{stage}", client_state=state)
            else:
                _, state = engine.load_checkpoint(directory, tag=f"stage{stage}")
                if loads:
                    weighting.load_state_dict(state["weighting"])
            _steps(engine, rank, range(2, 4))
            results.append(whole_parameters(engine))
            attached.detach()
        found.append(results)
    return found


CASES: dict[str, Callable[[int], Any]] = {
    "second backward": _second_backward,
    "gradients that wait": _gradients_that_wait,
    "inner module": _inner_module,
    "boundaries by hand": _boundaries_by_hand,
    "one by one": _one_by_one,
    "verified": _verified,
    "early forward": _early_forward,
    "detach": _detach,
    "scalar": _scalar,
    "clipping": _clipping,
    "not finite": _not_finite,
    "skipped": _skipped,
    "failures": _failures,
    "refused": _refused,
    "missing": _missing,
    "other version": _other_version,
    "public": _public,
    "public refusals": _public_refusals,
    "half precision": _half_precision,
    "tasks in half precision": _tasks_in_half_precision,
    "checkpointed": _checkpointed,
}


def _run(rank: int, world_size: int, directory: str) -> dict[str, Any]:
    with deepspeed_ready(rank):
        found = {name: case(rank) for name, case in CASES.items()}
        found["resume"] = _resume(rank, directory)
        found["pipeline"] = _pipeline(rank)  # its engine changes the groups of all others
        return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank found in every case."""
    return run_ranks(_run, 2, str(tmp_path_factory.mktemp("checkpoint")), timeout=300.0)


def _same(ranks: list[dict[str, Any]], name: str) -> Any:
    """What both ranks found alike."""
    assert ranks[0][name] == ranks[1][name]
    return ranks[0][name]


def test_a_second_backward_in_a_micro_step_is_refused(ranks: list[dict[str, Any]]) -> None:
    """Measured: stages 1 and 2 forget the first one."""
    for message in _same(ranks, "second backward"):
        assert message.startswith("RuntimeError: Found another backward of the same micro-step")
        assert "model_engine.step()" in message


def test_gradients_that_wait_are_not_mixed_with_a_backward(ranks: list[dict[str, Any]]) -> None:
    before, scalar, after = _same(ranks, "gradients that wait")
    assert "wait for model_engine.step()" in before and "wait for model_engine.step()" in scalar
    assert "another backward of the same micro-step" in after


@pytest.mark.parametrize("name", ["boundaries by hand", "one by one"])
def test_other_ways_through_a_step_agree(ranks: list[dict[str, Any]], name: str) -> None:
    for of_rank in ranks:
        for usual, other in of_rank[name]:
            assert (usual - other).norm() < 1e-6 * usual.norm()


def test_verify_agrees_with_brute_force(ranks: list[dict[str, Any]]) -> None:
    """Both in float32."""
    assert max(_same(ranks, "verified")) < 1e-5


def test_losses_that_pass_by_the_engine_are_refused(ranks: list[dict[str, Any]]) -> None:
    """Measured: with two micro-steps ZeRO-3 is 30 % off; the other stages are exact."""
    *others, message = _same(ranks, "inner module")
    assert others == ["no error"] * 3
    assert "UnsupportedModelError" in message and "model_engine.module" in message


def test_a_forward_before_attach_is_refused(ranks: list[dict[str, Any]]) -> None:
    for message in _same(ranks, "early forward"):
        assert "Attach before the forward" in message


def test_detach_restores_the_engine(ranks: list[dict[str, Any]]) -> None:
    for message in _same(ranks, "detach"):
        assert message.startswith("AssertionError: loss must be a scalar")  # DeepSpeed's own


def test_a_scalar_is_differentiated_as_before(ranks: list[dict[str, Any]]) -> None:
    for of_rank in ranks:
        assert not any(difference.any() for difference in of_rank["scalar"])


def test_unset_clipping_is_warned_about(ranks: list[dict[str, Any]]) -> None:
    stated, unset, by_engine = _same(ranks, "clipping")
    assert stated == []
    for said in (unset, by_engine):
        assert len(said) == 1 and '"gradient_clipping": 0.0' in said[0]


def test_nan_on_one_rank_is_an_error_on_all(ranks: list[dict[str, Any]]) -> None:
    found = _same(ranks, "not finite")
    for message, finite, moved in zip(found[::3], found[1::3], found[2::3], strict=True):
        assert message.startswith("NonFiniteObjectiveError") and "objective 3 (rank 1)" in message
        assert finite and moved


def test_nan_can_be_skipped(ranks: list[dict[str, Any]]) -> None:
    assert _same(ranks, "skipped") == [1, True] * len(STAGES)


def test_failures_reach_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for found in (ranks[0]["failures"], ranks[1]["failures"]):
        for weighting, graph, shape, arguments in (found[:4], found[4:]):
            assert weighting.startswith("RankError") and "no weights today" in weighting
            assert graph.startswith("RankError") and "rank 0 raised" in graph
            assert shape.startswith("LayoutMismatchError") and "rank 1: [*, 1]" in shape
            assert "parallel_chunk_size=0" in arguments and arguments.startswith("RankError")


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_configurations_are_refused(ranks: list[dict[str, Any]], name: str) -> None:
    message = _same(ranks, "refused")[name]
    assert message.startswith("UnsupportedModelError: Found a DeepSpeed engine with")
    assert REFUSED[name][1] in message


def test_other_engines_are_refused(ranks: list[dict[str, Any]]) -> None:
    assert "pipeline parallelism" in _same(ranks, "pipeline")
    assert "engine.compile()" in _same(ranks, "refused")["compiled later"]
    assert "DeepSpeed" in _same(ranks, "refused")["accumulate"]


def test_a_missing_attribute_names_the_versions_tested(ranks: list[dict[str, Any]]) -> None:
    found = _same(ranks, "missing")
    assert len(found) == 6
    for name, message in found.items():
        assert message.startswith("UnsupportedModelError"), (name, message)
        assert name in message and "expected DeepSpeed 0.19.8" in message


def test_another_version_takes_the_public_way(ranks: list[dict[str, Any]]) -> None:
    found = _same(ranks, "other version")
    assert len(found["stage 1"]) == 1 and "expected 0.19.8" in found["stage 1"][0]
    assert "0.21.0" in found["stage 3"] and "expected DeepSpeed 0.19.8" in found["stage 3"]


def test_the_public_way_gives_the_same_steps(ranks: list[dict[str, Any]]) -> None:
    """With dropout, whose random numbers the second forward repeats; float32 rounding."""
    for of_rank in ranks:
        for private, public in of_rank["public"]:
            assert (private - public).norm() < 1e-5 * private.norm()
    for message in _same(ranks, "public refusals"):
        assert message.startswith("UnsupportedModelError") and "public_only=True" in message


def _reference_step() -> tuple[Tensor, Tensor, Tensor]:
    """Gramian, weights and parameters of one step of one process."""
    model, (x, y) = make_network(), make_data()
    rows = jacobian(LOSSES["instance"](model(x), y), list(model.parameters()))
    gramian = rows @ rows.T
    weights = UPGradWeighting()(gramian)
    return gramian, weights, parameters_of(model) - 0.05 * weights @ rows


def test_bfloat16_steps_are_near_those_in_float64(ranks: list[dict[str, Any]]) -> None:
    """bfloat16 rounds by 4e-3; measured: Gramian 4e-3, weights 3e-3, parameters 2e-3."""
    gramian, weights, parameters = _reference_step()
    for of_rank in ranks:
        for found in of_rank["half precision"]:
            assert (found["gramian"] - gramian).norm() < 2e-2 * gramian.norm()
            assert (found["weights"] - weights).norm() < 5e-2 * weights.norm()
            assert (found["parameters"] - parameters).norm() < 5e-3 * parameters.norm()
        for found in of_rank["tasks in half precision"]:
            assert (found - parameters).norm() < 5e-3 * parameters.norm()


def test_recomputed_layers_and_every_caching_of_zero_3(ranks: list[dict[str, Any]]) -> None:
    model, (x, y) = Checkpointed(), make_data()
    rows = jacobian(LOSSES["instance"](model(x), y), list(model.parameters()))
    expected = UPGradWeighting()(rows @ rows.T) @ rows
    for of_rank in ranks:
        for found in of_rank["checkpointed"]:
            assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_checkpoint_resumes_with_the_state_of_the_weighting(ranks: list[dict[str, Any]]) -> None:
    for of_rank in ranks:
        for straight, resumed, forgetful in of_rank["resume"]:
            assert torch.equal(straight, resumed)
            assert not torch.equal(straight, forgetful)
