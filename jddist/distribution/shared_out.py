"""Many small weightings at once: every rank runs some of them, and all learn all weights.

Only weightings that follow from their Gramian and settings alone can be shared out, and only if all
ranks have the same settings; the others run on rank 0, in their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jddist._progress import enter
from jddist.aggregation import Weighting
from jddist.errors import RankError
from jddist.linalg import DualConeProjector

from .collectives import Group
from .once import Job, checked

_OF_MODULES = frozenset(vars(nn.Module()))


def fingerprint(weighting: Callable[[Tensor], Tensor]) -> str | None:
    """What is the same for weightings that give the same weights; None if they are not shared out.

    A rank that runs a weighting for all must not leave the others behind: nothing may wait for the
    call (hooks), and nothing may remember it.
    """
    if not isinstance(weighting, Weighting) or not type(weighting).__dict__.get("pure", False):
        return None
    described = _described(weighting)
    if described is None:
        return None
    return hashlib.blake2b(described.encode(), digest_size=12).hexdigest()


def _described(module: nn.Module) -> str | None:
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    parts = [f"{type(module).__module__}.{type(module).__qualname__}"]
    for name, value in sorted((vars(module) | module._buffers | module._parameters).items()):
        if name in _OF_MODULES:
            continue
        if isinstance(value, DualConeProjector):
            if not type(value).__module__.startswith("jddist."):
                return None
            parts.append(f"{name}={value!r}")  # its settings; what it counts is left out
        elif isinstance(value, Tensor):
            parts.append(f"{name}={value.dtype}{value.tolist()}")
        elif value is None or isinstance(value, bool | int | float | str):
            parts.append(f"{name}={value!r}")
        else:
            return None
    for name, child in module._modules.items():
        described = None if child is None else _described(child)
        if described is None:
            return None
        parts.append(f"{name}=({described})")
    return "; ".join(parts)


def run_shared_out(group: Group, jobs: Sequence[Job]) -> list[Tensor]:
    """The weights of each job, one rank running it for all.

    Args:
        group: The ranks; all of them have to call, with jobs whose fingerprints are the same.
        jobs: What to run.

    Returns:
        Weights in the statistics' dtype (at least float32), bit-identical on all ranks.

    Raises:
        RankError: A weighting failed on some rank.
    """
    device = jobs[0].statistic.device
    counts = [job.shape.numel() for job in jobs]
    # Zeros of all ranks but one: the sum is what that one wrote.
    buffer = torch.zeros(group.size + sum(counts), dtype=torch.float64, device=device)
    failed, *parts = buffer.split([group.size, *counts])
    failure: Exception | None = None
    enter("weighting")
    for i in range(group.rank, len(jobs), group.size):
        try:
            weights = checked(jobs[i], jobs[i].weighting(jobs[i].statistic))
            parts[i].copy_(weights.detach().reshape(-1))
        except Exception as error:  # raised on every rank, below
            failure = error
            parts[i].zero_()
            failed[group.rank] = 1.0
            break
    group.all_reduce(buffer)
    if bool(failed.any()):
        message = "" if failure is None else f"{type(failure).__name__}: {failure}"
        content = message.encode() or b"-"
        lengths = group.gather_header(torch.tensor([len(content)])).flatten().tolist()
        texts = group.gather_payloads(content, lengths)
        listed = "; ".join(
            f"on rank {rank}: {text.decode()}"
            for rank, text in enumerate(texts)
            if bool(failed[rank])
        )
        raise RankError(f"The weighting failed {listed}") from failure
    if not bool(torch.isfinite(buffer).all()):
        raise RankError(
            "Found NaN or infinity among the weights that the ranks told each other, where they "
            "were finite; expected them as they were sent. No .grad was written. Look at the "
            "network and the memory of these machines."
        )
    return [
        part.reshape(job.shape).to(torch.promote_types(job.statistic.dtype, torch.float32))
        for job, part in zip(jobs, parts, strict=True)
    ]
