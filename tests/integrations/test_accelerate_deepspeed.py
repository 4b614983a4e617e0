"""Accelerate's DeepSpeed plugin: ``accelerator.backward`` is given the right scalar."""

from __future__ import annotations

import os

import pytest
from torch import Tensor

from jddist.aggregation import UPGradWeighting
from jddist.autogram import Engine
from tests._ranks import run_ranks
from tests.distributed._training import (
    LOSSES,
    OPTIMIZERS,
    STEPS,
    local_part,
    make_data,
    make_network,
)
from tests.integrations._host import as_launched
from tests.integrations._reference import MICRO, check, reference

pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")
pytest.importorskip("jddist.distribution.zero")

# DeepSpeed keeps float32 at best.
BOUND = 2e-6


def _train(rank: int, world_size: int, cases: list[tuple[int, int]]) -> list[list[Tensor]]:
    from tests.distributed._deepspeed import deepspeed_ready

    as_launched(rank, world_size)
    with deepspeed_ready(rank):
        return [_steps(rank, world_size, stage, micro) for stage, micro in cases]


def _steps(rank: int, world_size: int, stage: int, micro: int) -> list[Tensor]:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, GradientState

    from jddist.integrations.accelerate import backward
    from tests.distributed._deepspeed import STRICT, whole_parameters

    os.environ.pop("ACCELERATE_USE_CPU", None)  # which would rule DeepSpeed out
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": micro,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **(STRICT if stage == 3 else {})},
    }
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), gradient_accumulation_steps=micro
    )
    assert accelerator.gradient_accumulation_steps == micro
    network = make_network().float()
    parameters = [p for p in network.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(network, OPTIMIZERS["sgd"](parameters))
    engine = Engine(model, batch_dim=0)
    data = [t.float() for t in make_data()]
    trace = []
    for _ in range(STEPS):
        for part in MICRO[micro]:
            x, y = (local_part(t[part], rank, world_size, "uneven") for t in data)
            with accelerator.accumulate(model):
                losses = LOSSES["instance"](model(x), y)
                backward(accelerator, engine, losses, UPGradWeighting())
                optimizer.step()
                optimizer.zero_grad()
        trace.append(whole_parameters(model))
    return trace


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "cases",
    [[(1, 1), (3, 2)], pytest.param([(0, 1), (1, 2), (2, 2), (3, 1)], marks=pytest.mark.slow)],
    ids=["two", "the others"],
)
def test_every_stage_takes_the_step_of_one_process(
    cases: list[tuple[int, int]], world_size: int
) -> None:
    """Also of micro-batches, of which DeepSpeed takes the mean."""
    ranks = run_ranks(_train, world_size, cases)
    for i, (_, micro) in enumerate(cases):
        check([rank[i] for rank in ranks], reference("instance", micro=micro), bound=BOUND)
