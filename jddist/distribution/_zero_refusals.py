"""DeepSpeed engines with which the answer would not be exact, or was never tested: refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from jddist.errors import UnsupportedModelError

from ._zero_internals import configuration


def check_engine(engine: Any) -> None:
    """Raises UnsupportedModelError unless the engine's configuration is supported."""
    for found, fix in _refused(engine):
        raise UnsupportedModelError(
            f"Found a DeepSpeed engine with {found}; expected ZeRO stage 0, 1, 2 or 3 in float32 "
            f"or bfloat16, data-parallel alone. {fix}"
        )


def check_usable_now(engine: Any) -> None:
    """Raises UnsupportedModelError if the engine was changed since it was attached."""
    if engine.is_compiled:
        raise UnsupportedModelError(
            "Found a DeepSpeed engine after engine.compile(); expected one that is not compiled, "
            "since compiled passes hide the backward's hooks. Leave out engine.compile()."
        )
    if not engine.enable_backward_allreduce:
        raise UnsupportedModelError(
            "Found a DeepSpeed engine whose backward does not reduce gradients (an optimizer that "
            "compresses them does that); expected one that averages them over all ranks. Use "
            "another optimizer."
        )


def warn_if_clipping_is_unset(engine: Any) -> None:
    """DeepSpeed 0.19.8 clips to norm 1 where the configuration says nothing."""
    if "gradient_clipping" in configuration(engine) or not engine.gradient_clipping():
        return
    warnings.warn(
        "Found no gradient_clipping in DeepSpeed's configuration, which then clips the gradients "
        f"to norm {engine.gradient_clipping()}; expected it to be stated, since a clipped update "
        'is not that of one process without clipping. Add "gradient_clipping": 0.0 to the '
        "configuration, or the norm that you want.",
        stacklevel=2,
    )


def _refused(engine: Any) -> Iterator[tuple[str, str]]:
    """What is found, and the fix."""
    if "PipelineEngine" in {cls.__name__ for cls in type(engine).__mro__}:
        yield (
            "pipeline parallelism",
            "Use deepspeed.initialize on a plain module, not on a PipelineModule.",
        )
    optimizer = type(engine.optimizer).__name__
    if optimizer in ("NoneType", "DummyOptim", "DeepSpeedZeRoOffload"):
        yield "no optimizer", "Pass one to deepspeed.initialize, or name one in the configuration."
    for what, how in _MODES.items():
        if _asked(engine, what):
            yield how
    if not _asked(engine, "gradient_average"):
        yield "gradients that are summed over ranks", "Leave out gradient_allreduce_op."
    if not _asked(engine, "managed_gradient_accumulation"):
        yield "managed_gradient_accumulation=False", "Leave it out."
    for name in ("zero_offload_optimizer", "zero_offload_param"):
        device = getattr(_asked(engine, name), "device", None)
        if device is not None and str(getattr(device, "value", device)) != "none":
            part = name.removeprefix("zero_")
            yield f"zero_optimization.{part}", f"Leave out {part}."
    if (_asked(engine, "zero_hpz_partition_size") or 1) > 1:
        yield "zero_hpz_partition_size (ZeRO++)", "Leave it out."
    sizes = ("mp_world_size", "sequence_parallel_size", "autotp_size")
    parallel = any((_asked(engine, size) or 1) > 1 for size in sizes)
    if parallel or engine.dp_world_size != dist.get_world_size():
        yield "model, tensor or sequence parallelism", "Use data parallelism over all ranks."
    name = (engine.optimizer_name() or "").lower()
    if any(part in name for part in ("onebit", "zeroone")):
        yield "an optimizer that compresses gradients", "Use another optimizer."


# Questions to an engine, and what is refused, with the fix, if the answer is yes.
_MODES = {
    "fp16_enabled": (
        "fp16, whose gradients underflow unless they are scaled",
        'Use "bf16": {"enabled": true}.',
    ),
    "torch_autocast_enabled": ("torch_autocast", 'Use "bf16": {"enabled": true}.'),
    "zero_quantized_weights": ("zero_quantized_weights (ZeRO++)", "Leave it out."),
    "zero_quantized_nontrainable_weights": (
        "zero_quantized_nontrainable_weights (ZeRO++)",
        "Leave it out.",
    ),
    "zero_quantized_gradients": ("zero_quantized_gradients (ZeRO++)", "Leave it out."),
    "zenflow": ("ZenFlow", "Leave out zero_optimization.zenflow."),
    "super_offload": ("SuperOffload", "Leave out super_offload."),
    "is_deepcompile_enabled": ("DeepCompile", "Leave out the compile section."),
    "is_compiled": ("compiled code", "Leave out engine.compile()."),
    "has_moe_layers": ("mixture-of-experts layers", "Use a dense model."),
    "random_ltd_enabled": ("random_ltd, which drops tokens", "Leave out random_ltd."),
}


def _asked(engine: Any, name: str) -> Any:
    """What an engine answers; None if it does not know the question."""
    answer = getattr(engine, name, None)
    return answer() if callable(answer) else answer
