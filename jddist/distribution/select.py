"""The one place that turns a model, wrapped or not, into its Distribution."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement
from torch.nn.parallel import DataParallel as ThreadedDataParallel
from torch.nn.parallel import DistributedDataParallel

from jddist.errors import UnattachedParameterError, UnsupportedModelError

from .base import Distribution, all_attached, attached_distribution
from .data_parallel import DataParallel
from .fully_shard import FullyShard
from .local import Local
from .tensor_parallel import TensorParallel
from .whole import is_partitioned
from .zero import Zero


def num_ranks() -> int:
    """The number of ranks that run, whether or not they have to do with each other."""
    if not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size()


def is_engine(module: nn.Module) -> bool:
    """Whether it is DeepSpeed's; asked without importing DeepSpeed."""
    return any(
        cls.__name__ == "DeepSpeedEngine" and cls.__module__.startswith("deepspeed.")
        for cls in type(module).__mro__
    )


def unwrap(module: nn.Module) -> nn.Module:
    """The user's model inside its wrapper."""
    wrapped = isinstance(module, DistributedDataParallel) or is_engine(module)
    inner: Any = module.module if wrapped else module
    return inner


def select(
    modules: Iterable[nn.Module],
    objectives: Placement | None,
    *,
    public_only: bool | None = None,
) -> Distribution | None:
    """The distribution that the modules' wrappers state, or None if there is no wrapper.

    Args:
        modules: The modules, wrapped or not.
        objectives: The placement of autojac's rows, or None.
        public_only: Whether to do without the internals of a DeepSpeed engine.

    Raises:
        UnsupportedModelError: The modules are wrapped in something that is not supported, or only
            some of the trainable parameters are wrapped.
    """
    modules = list(modules)
    engines = [m for root in modules for m in root.modules() if is_engine(m)]
    if engines:
        return _of_engine(engines, modules, objectives, public_only)
    wrappers: dict[DistributedDataParallel, None] = {}
    shards = False
    tensors = any(isinstance(p, DTensor) for root in modules for p in root.parameters())
    for root in modules:
        _refuse_unsupported(root)
        for module in root.modules():
            _refuse_unsupported(module)
            if isinstance(module, DistributedDataParallel):
                wrappers[module] = None
            shards = shards or isinstance(module, FSDPModule)
    if shards:
        if wrappers:
            raise UnsupportedModelError(
                "Found modules in DistributedDataParallel and modules in fully_shard; expected one "
                "kind of wrapper. Use fully_shard for the whole model."
            )
        return _sharded(modules, objectives, FullyShard)
    _refuse_partitioned(p for root in modules for p in root.parameters())
    _refuse_tensor_parallel(wrappers)
    if tensors:
        return _sharded(modules, objectives, TensorParallel)
    if not wrappers:
        return None
    distribution = _attached_already(wrappers, objectives) or DataParallel(
        list(wrappers), objectives
    )
    bare = [
        name
        for root in modules
        for name, p in root.named_parameters()
        if p.requires_grad and p not in distribution.names
    ]
    if bare and distribution.group.size > 1:
        distribution.detach()
        raise UnsupportedModelError(
            f"Found trainable parameters outside of the DistributedDataParallel wrappers: "
            f"{', '.join(bare)}; expected all of them inside. Wrap the whole model."
        )
    return distribution


def originals(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The parameters themselves, where a wrapper put others in their place."""
    stand_ins: dict[Tensor, Tensor] = {}
    for distribution in dict.fromkeys(all_attached()):
        stand_ins.update(distribution.stand_ins())
    return [stand_ins.get(tensor, tensor) for tensor in tensors]


def distribution_of(parameters: Iterable[Tensor], given: Distribution | None) -> Distribution:
    """The distribution that all the parameters belong to.

    Args:
        parameters: Parameters that will get gradients.
        given: What the caller stated explicitly, if anything.

    Raises:
        UnattachedParameterError: Several ranks run and a parameter belongs to none.
        ValueError: The parameters belong to different distributions.
    """
    parameters = originals(parameters)
    if given is not None:
        _check_is_local(parameters, given)
        return given
    if not parameters and num_ranks() > 1:
        # A call with wrong arguments: the others have to hear of it all the same.
        only = {id(d): d for d in all_attached()}
        if len(only) == 1:
            return next(iter(only.values()))
    found = [attached_distribution(p) for p in parameters]
    known = {id(d): d for d in found if d is not None}
    if len(known) > 1:
        raise ValueError(
            f"Found parameters of {len(known)} separately attached models in one call; expected "
            "those of one. Attach one wrapper that contains them all."
        )
    missing = [p for p, d in zip(parameters, found, strict=True) if d is None]
    if missing and num_ranks() > 1:
        shapes = ", ".join(str(tuple(p.shape)) for p in missing[:5])
        raise UnattachedParameterError(
            f"Found {len(missing)} parameters (of shapes {shapes}) that belong to no attached "
            f"model while {num_ranks()} ranks run; expected to know how they are distributed. "
            "Wrap the model in DistributedDataParallel, or call fully_shard on it, and then "
            "jddist.attach(model) (an Engine on the wrapper does), or pass distribution=Local() if "
            "every rank is meant to work alone."
        )
    return next(iter(known.values()), None) or Local()


def _check_is_local(parameters: Iterable[Tensor], given: Distribution) -> None:
    """Raises ValueError if ranks that are meant to work alone hold parts of parameters."""
    if isinstance(given, Local) and any(isinstance(p, DTensor) for p in parameters):
        raise ValueError(
            "Found distribution=Local() and a parameter that is a DTensor; expected plain ones, "
            "since a rank alone does not have all columns. Leave out distribution=."
        )


def _attached_already(
    wrappers: Iterable[DistributedDataParallel], objectives: Placement | None
) -> DataParallel | None:
    """The distribution of an earlier ``attach``, unless this call states other objectives."""
    wrappers = list(wrappers)
    found = {id(d): d for w in wrappers for d in (attached_distribution(p) for p in w.parameters())}
    if len(found) != 1:
        return None
    (distribution,) = found.values()
    if not isinstance(distribution, DataParallel) or distribution.wrappers != wrappers:
        return None
    if objectives is not None and distribution.objectives != objectives:
        return None
    return distribution


def _sharded(
    modules: list[nn.Module], objectives: Placement | None, kind: type[FullyShard | TensorParallel]
) -> FullyShard | TensorParallel:
    """The distribution of an earlier ``attach`` of the same models, or a new one."""
    for distribution in all_attached():
        if not isinstance(distribution, kind):
            continue
        known = {m for root in distribution.roots for m in root.modules()}
        stated = objectives in (None, distribution.objectives)
        if stated and all(root in known for root in modules):
            distribution.put_back()
            return distribution
    return kind(modules, objectives)


def _refuse_unsupported(module: nn.Module) -> None:
    kinds = {cls.__name__ for cls in type(module).__mro__}
    if isinstance(module, ThreadedDataParallel):
        found, fix = "torch.nn.DataParallel", "Use DistributedDataParallel with one process a GPU."
    elif "FullyShardedDataParallel" in kinds:
        found = "FSDP1"
        fix = (
            "Call torch.distributed.fsdp.fully_shard on each layer and on the model instead of "
            "FullyShardedDataParallel."
        )
    elif "ReplicateModule" in kinds:
        found, fix = "replicate", "Use DistributedDataParallel."
    else:
        return
    raise UnsupportedModelError(
        f"Found a model wrapped in {found}; expected a plain model, DistributedDataParallel, "
        "fully_shard, layers of parallelize_module, or a DeepSpeed engine, which are what is "
        f"supported so far. {fix}"
    )


def _of_engine(
    engines: list[nn.Module],
    modules: list[nn.Module],
    objectives: Placement | None,
    public_only: bool | None,
) -> Zero:
    """The distribution of an earlier ``attach`` of the same engine, or a new one."""
    known = {p for p in engines[0].parameters()}
    bare = [n for root in modules for n, p in root.named_parameters() if p not in known]
    if len(set(engines)) > 1 or bare:
        raise UnsupportedModelError(
            f"Found {len(set(engines))} DeepSpeed engines and {len(bare)} parameters outside of "
            "the first; expected one engine that holds the whole model. Pass it alone."
        )
    for distribution in all_attached():
        if not isinstance(distribution, Zero) or not distribution.is_of(engines[0]):
            continue
        if public_only in (None, distribution.public_only):
            distribution.restate(objectives)
            return distribution
        distribution.detach()
    return Zero(engines[0], objectives, public_only)


def _refuse_partitioned(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        if is_partitioned(parameter) and attached_distribution(parameter) is None:
            raise UnsupportedModelError(
                "Found a parameter that DeepSpeed's ZeRO-3 has partitioned; expected its engine. "
                "Pass the engine that deepspeed.initialize returned."
            )


def _refuse_tensor_parallel(wrappers: Iterable[DistributedDataParallel]) -> None:
    """Refuses DDP over tensor-parallel layers: with its ``device_mesh``, torch (2.13) takes their
    parameters out of the modules at the first forward and never puts them back."""
    for wrapper in wrappers:
        module = wrapper.module
        held = any(isinstance(v, DTensor) for m in module.modules() for v in vars(m).values())
        if held or any(hasattr(p, "_st_info") for p in module.parameters()):
            raise UnsupportedModelError(
                "Found DistributedDataParallel around layers of parallelize_module; expected "
                "fully_shard, since DistributedDataParallel leaves such layers without parameters "
                "after the first forward, and model.parameters() without them. Call "
                'fully_shard(..., mesh=mesh["dp"]) on the modules instead.'
            )
