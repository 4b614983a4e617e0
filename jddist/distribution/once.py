"""Runs a weighting on rank 0 alone and makes every rank leave with the same result and state.

What follows the weights: an exception with its message, the state of a stateful weighting, and
torch's default random state, so that ranks that were seeded alike stay alike.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jddist._stateful import Stateful
from jddist.errors import RankError

from .collectives import Group

_OK, _FAILED = 0.0, 1.0


def run_on_rank_zero(
    group: Group, weighting: Callable[[Tensor], Tensor], statistic: Tensor
) -> Tensor:
    """The result of ``weighting(statistic)``, computed on rank 0 and broadcast.

    Args:
        group: The ranks; all of them have to call.
        weighting: Any callable; on the other ranks it is not run.
        statistic: A Gramian or a matrix of m rows; the result has the shape of the first half of a
            Gramian's dimensions, and its dtype and device.

    Raises:
        RankError: The weighting raised on rank 0 (with several ranks; alone, its own error).
    """
    if group.size == 1:
        return weighting(statistic)
    shape = statistic.shape[: max(1, statistic.ndim // 2)] if statistic.ndim else statistic.shape
    dtype = torch.promote_types(statistic.dtype, torch.float32)
    count = shape.numel()
    # Weights travel as float64, to which every narrower dtype converts without loss.
    buffer = torch.zeros(2 + count, dtype=torch.float64, device=statistic.device)
    payload, failure = b"", None
    if group.rank == 0:
        try:
            weights, payload = _run(weighting, statistic, shape)
            buffer[2:] = weights.reshape(-1)
            dtype = weights.dtype
        except Exception as error:  # it is raised again on every rank, below
            failure = error
            payload = f"{type(error).__name__}: {error}".encode()
            buffer[0] = _FAILED
        buffer[1] = len(payload)
    group.broadcast(buffer)
    failed, length = bool(buffer[0] == _FAILED), int(buffer[1])
    if length:
        payload = group.broadcast_payload(payload if group.rank == 0 else None, length)
    if failed:
        raise RankError(f"The weighting failed on rank 0: {payload.decode()}") from failure
    if length and group.rank != 0:
        _apply(payload, weighting, statistic.device)
    return buffer[2:].reshape(shape).to(dtype)


def _run(
    weighting: Callable[[Tensor], Tensor], statistic: Tensor, shape: torch.Size
) -> tuple[Tensor, bytes]:
    before = _random_states(statistic.device)
    weights = weighting(statistic)
    if weights.shape != shape:
        raise ValueError(
            f"Found weights of shape {tuple(weights.shape)}; expected {tuple(shape)}, one weight "
            "per objective."
        )
    follow: dict[str, Any] = {}
    if isinstance(weighting, Stateful) and isinstance(weighting, nn.Module):
        follow["state"] = weighting.state_dict()
    after = _random_states(statistic.device)
    changed = {
        name: {"before": _hash(before[name]), "after": state}
        for name, state in after.items()
        if not torch.equal(before[name], state)
    }
    if changed:
        follow["random"] = changed
    if not follow:
        return weights.detach(), b""
    content = io.BytesIO()
    torch.save(follow, content)
    return weights.detach(), content.getvalue()


def _apply(payload: bytes, weighting: Callable[[Tensor], Tensor], device: torch.device) -> None:
    follow = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
    if "state" in follow:
        assert isinstance(weighting, nn.Module)
        weighting.load_state_dict(follow["state"])
    mine = _random_states(device)
    for name, change in follow.get("random", {}).items():
        if _hash(mine[name]) != change["before"]:
            continue  # this rank was seeded differently: its own stream goes on
        if name == "cpu":
            torch.set_rng_state(change["after"])
        else:
            torch.get_device_module(device).set_rng_state(change["after"], device)


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def _hash(state: Tensor) -> str:
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=16).hexdigest()
