"""Runs weightings on rank 0 and makes every rank leave with the same results and state.

Weightings that deal out their work run on every rank; the weights are rank 0's all the same. What
follows the weights: an exception with its message, the state of stateful weightings, and torch's
default random state, so that ranks that were seeded alike stay alike.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jddist._progress import enter
from jddist._seeded import draws_from_own_generator
from jddist._stateful import Stateful
from jddist.errors import RankError
from jddist.linalg._dealing import is_dealt

from .collectives import Group
from .dealt import run_dealt

_OK, _FAILED, _DEALS = 0.0, 1.0, 2.0


class Job(NamedTuple):
    """A weighting to run, and what to run it on.

    Attributes:
        weighting: Any callable.
        statistic: A generalized Gramian; or a matrix, whose rows then get a weight each.
        shape: The shape of the weights.
    """

    weighting: Callable[[Tensor], Tensor]
    statistic: Tensor
    shape: torch.Size


def run_on_rank_zero(group: Group, jobs: Sequence[Job]) -> list[Tensor]:
    """The weights of each job, computed on rank 0 and broadcast together.

    Args:
        group: The ranks; all of them have to call, with jobs of the same shapes.
        jobs: What to run; on the other ranks the weightings are not called, unless rank 0's deal
            out their work.

    Returns:
        Weights in the statistics' dtype (at least float32), bit-identical on all ranks.

    Raises:
        RankError: A weighting raised on rank 0 (with several ranks; alone, its own error).
        LayoutMismatchError: Rank 0 deals out its work, and some rank has another weighting.
        ValueError: A weighting returned weights of another shape, or that are not finite (alone).
    """
    if group.size == 1:
        return [checked(job, job.weighting(job.statistic)) for job in jobs]
    device = jobs[0].statistic.device
    counts = [job.shape.numel() for job in jobs]
    # Weights travel as float64, to which every narrower dtype converts without loss.
    buffer = torch.zeros(2 + sum(counts), dtype=torch.float64, device=device)
    parts = buffer[2:].split(counts)
    payload, failure = b"", None
    enter("weighting" if group.rank == 0 else "broadcast")
    if group.rank == 0:
        deals = [is_dealt(job.weighting, job.shape.numel()) for job in jobs]
        dealt: list[Tensor | None] = [None] * len(jobs)
        if any(deals):  # the others would not know: theirs may be other weightings
            buffer[0] = _DEALS
            for part, deal in zip(parts, deals, strict=True):
                part.fill_(deal)
            group.broadcast(buffer)
            dealt = _run_dealt(group, jobs, deals)
            buffer.zero_()
        try:
            weights, payload = _run(jobs, dealt, device)
            buffer[2:] = weights
        except Exception as error:  # it is raised again on every rank, below
            failure = error
            payload = f"{type(error).__name__}: {error}".encode()
            buffer[0] = _FAILED
        buffer[1] = len(payload)
        enter("broadcast")
    group.broadcast(buffer)
    if buffer[0] == _DEALS:
        _run_dealt(group, jobs, [bool(part.any()) for part in parts])
        group.broadcast(buffer)
    failed, length = bool(buffer[0] == _FAILED), int(buffer[1])
    if length:
        payload = group.broadcast_payload(payload if group.rank == 0 else None, length)
    if failed:
        raise RankError(f"The weighting failed on rank 0: {payload.decode()}") from failure
    if not bool(torch.isfinite(buffer[2:]).all()):
        raise RankError(
            "Found NaN or infinity among the weights that came from rank 0, where they were "
            "finite; expected them as they were sent. No .grad was written. Look at the network "
            "and the memory of this machine."
        )
    if length and group.rank != 0:
        _apply(payload, jobs, device)
    return [
        part.reshape(job.shape).to(torch.promote_types(job.statistic.dtype, torch.float32))
        for job, part in zip(jobs, parts, strict=True)
    ]


def checked(job: Job, weights: Tensor) -> Tensor:
    """The weights. Raises ValueError unless they have the job's shape and are finite."""
    if weights.shape != job.shape:
        raise ValueError(
            f"Found weights of shape {tuple(weights.shape)}; expected {tuple(job.shape)}, one "
            "weight per objective."
        )
    if not bool(torch.isfinite(weights).all()):
        raise ValueError(
            f"Found NaN or infinity among the weights of {_name(job.weighting)}; expected finite "
            "ones. Take a method that suits this Gramian (see docs/methods.md on ill-conditioned "
            "ones)."
        )
    return weights


def _name(weighting: Callable[[Tensor], Tensor]) -> str:
    return getattr(weighting, "__name__", type(weighting).__name__)


def _run_dealt(group: Group, jobs: Sequence[Job], deals: Sequence[bool]) -> list[Tensor | None]:
    """The weights of each job whose work is dealt out, and None for the others."""
    return [
        run_dealt(group, job.weighting, job.statistic, job.shape) if deal else None
        for job, deal in zip(jobs, deals, strict=True)
    ]


def _run(
    jobs: Sequence[Job], known: Sequence[Tensor | None], device: torch.device
) -> tuple[Tensor, bytes]:
    """All weights in one float64 vector, and what has to follow them, serialised."""
    before = _random_states(device)
    results = [
        checked(job, job.weighting(job.statistic)).detach() if weights is None else weights
        for job, weights in zip(jobs, known, strict=True)
    ]
    follow: dict[str, Any] = {
        "states": [_state(job.weighting) for job in jobs],
        "random": {
            name: {"before": _hash(before[name]), "after": state}
            for name, state in _random_states(device).items()
            if not torch.equal(before[name], state)
        },
    }
    weights = torch.cat([r.reshape(-1).to(device=device, dtype=torch.float64) for r in results])
    if not follow["random"] and all(state is None for state in follow["states"]):
        return weights, b""
    content = io.BytesIO()
    torch.save(follow, content)
    return weights, content.getvalue()


def _apply(payload: bytes, jobs: Sequence[Job], device: torch.device) -> None:
    follow = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
    for job, state in zip(jobs, follow["states"], strict=True):
        if state is not None and isinstance(job.weighting, nn.Module):
            job.weighting.load_state_dict(state)
    mine = _random_states(device)
    for name, change in follow["random"].items():
        if _hash(mine[name]) != change["before"]:
            continue  # this rank was seeded differently: its own stream goes on
        if name == "cpu":
            torch.set_rng_state(change["after"])
        else:
            torch.get_device_module(device).set_rng_state(change["after"], device)


def _state(weighting: Callable[[Tensor], Tensor]) -> dict[str, Any] | None:
    if not isinstance(weighting, nn.Module):
        return None
    stateful = any(isinstance(module, Stateful) for module in weighting.modules())
    if not stateful and not draws_from_own_generator(weighting):
        return None
    return weighting.state_dict()


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def _hash(state: Tensor) -> str:
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=16).hexdigest()
