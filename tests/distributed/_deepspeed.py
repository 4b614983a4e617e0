"""DeepSpeed engines for the multi-rank tests, and what they leave behind.

DeepSpeed keeps float32 master weights at best (stage 0 refuses float64 gradients, stages 1 to 3
round them), so nothing here can agree with one process in float64 to better than float32 rounding.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tests.distributed._training import flatten

# ZeRO-3 keeps nothing: no parameter persists, stays alive, waits for its reuse or is fetched ahead.
STRICT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


@contextmanager
def deepspeed_ready(rank: int) -> Iterator[Any]:
    """DeepSpeed over the group that is there already, without compiling its shared-memory kernels.

    Yields:
        The package.
    """
    os.environ.update(LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    logging.disable(logging.WARNING)  # of DeepSpeed, which says something at every step
    with warnings.catch_warnings():
        # DeepSpeed 0.19.8 calls functions that torch 2.13 has renamed.
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            message = f"`torch.distributed.{name}` is deprecated"
            warnings.filterwarnings("ignore", message=message, category=FutureWarning)
        # It compiles an optimizer's step at import, for which torch scripts a layer.
        message = "`torch.jit.script_method` is deprecated"
        warnings.filterwarnings("ignore", message=message, category=DeprecationWarning)
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        yield deepspeed


def make_engine(
    model: nn.Module,
    stage: int,
    *,
    steps: int = 1,
    zero: dict[str, Any] | None = None,
    **config: Any,
) -> Any:
    """An engine with plain SGD, and no clipping unless the configuration says so."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **(STRICT if stage == 3 else {}), **(zero or {})},
        **config,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings)
    return engine


def reference_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """What ``make_engine`` uses, for one process."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.05, momentum=0.9)


def whole_parameters(engine: Any) -> Tensor:
    """All parameters [n]; every rank has to call."""
    import deepspeed

    parameters = list(engine.module.parameters())
    partitioned = engine.zero_optimization_stage() == 3
    gathered = deepspeed.zero.GatheredParameters(parameters) if partitioned else nullcontext()
    with gathered:
        return flatten(parameters).clone().double()


def whole_gradients(engine: Any) -> Tensor:
    """What ``engine.step()`` is going to use [n]; every rank has to call."""
    from deepspeed.utils import safe_get_full_grad

    trained = [p for p in engine.module.parameters() if p.requires_grad]
    return flatten([safe_get_full_grad(p) for p in trained]).clone().double()
