"""What the ranks tell each other before they exchange anything: one small all-gather per call.

Each rank says which call it is in, whether it failed, and a digest of what must agree and of what
the others need to know. The contents themselves follow only if a digest is new or differs. So a
rank that raised, or that has another model or dtype, ends the call with the same named error on
every rank, and none of them waits for the others.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from jddist._progress import enter
from jddist.errors import LayoutMismatchError, RankError

from .collectives import Group

_CACHE_SIZE = 64
_OK, _FAILED = 0, 1
_TOLD = "_jddist_told"  # of an exception that a handshake raised on every rank


class Handshake:
    """Handshakes over one group; remembers contents by digest.

    The cache is the same on all ranks, since all of them see the same sequence of digests.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._seen: OrderedDict[tuple[int, ...], list[dict[str, Any]]] = OrderedDict()

    def __call__(
        self,
        call: str,
        agree: Mapping[str, Any],
        info: Mapping[str, Any],
        error: Exception | None = None,
    ) -> list[dict[str, Any]]:
        """Exchanges ``info`` and compares ``agree``.

        Args:
            call: The name of the public function under way.
            agree: JSON values that have to be the same on every rank.
            info: JSON values that every rank gets to know of every other.
            error: The exception that this rank ran into, if any.

        Returns:
            Every rank's ``info``, in rank order.

        Raises:
            LayoutMismatchError: The ranks disagree on ``call`` or ``agree``.
            RankError: Some rank, but not every one, had an ``error``.
            Exception: The own ``error``, if every rank had one.
        """
        if self._group.size == 1:
            if error is not None:
                raise error
            return [dict(info)]
        enter("handshake")
        message = "" if error is None else f"{type(error).__name__}: {error}"
        content = {"call": call, "agree": dict(agree), "info": dict(info), "error": message}
        payload = json.dumps(content, sort_keys=True).encode()
        status = _OK if error is None else _FAILED
        shared = json.dumps([call, content["agree"]], sort_keys=True).encode()
        header = torch.tensor([status, len(payload), _digest(payload), _digest(shared)])
        headers = self._group.gather_header(header).tolist()
        key = tuple(h[2] for h in headers)
        agreed = all(h[0] == _OK and h[3] == headers[0][3] for h in headers)
        if agreed and key in self._seen:
            self._seen.move_to_end(key)
            return self._seen[key]
        payloads = self._group.gather_payloads(payload, [h[1] for h in headers])
        contents = [json.loads(p) for p in payloads]
        if not agreed:
            failure = _same_error(contents, error)
            setattr(failure, _TOLD, True)
            if failure is error:
                raise failure
            raise failure from error
        infos = [c["info"] for c in contents]
        self._seen[key] = infos
        if len(self._seen) > _CACHE_SIZE:
            self._seen.popitem(last=False)
        return infos


def was_told(error: BaseException) -> bool:
    """Whether a handshake has raised an exception, or what led to it, on every rank."""
    found: BaseException | None = error
    while found is not None and not hasattr(found, _TOLD):
        found = found.__cause__ or found.__context__
    return found is not None


def _same_error(contents: list[dict[str, Any]], own: Exception | None) -> Exception:
    """The error that every rank raises; the own one if all had one and it is the same."""
    errors = {rank: c["error"] for rank, c in enumerate(contents) if c["error"]}
    if own is not None and len(set(errors.values())) == 1 and len(errors) == len(contents):
        return own
    if errors:
        listed = "; ".join(f"rank {rank} raised {message}" for rank, message in errors.items())
        call = contents[0]["call"]
        return RankError(
            f"{call} failed before the ranks exchanged anything: {listed}. No .grad was written."
        )
    calls = [c["call"] for c in contents]
    if len(set(calls)) > 1:
        listed = ", ".join(f"rank {rank}: {call}" for rank, call in enumerate(calls))
        return LayoutMismatchError(
            f"Found the ranks in different calls ({listed}); expected the same one. Every rank has "
            "to make the same sequence of jddist calls."
        )
    differing = []
    for name in sorted({name for c in contents for name in c["agree"]}):
        values = [c["agree"].get(name) for c in contents]
        if any(v != values[0] for v in values):
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            differing.append(f"{name} ({listed})")
    return LayoutMismatchError(
        f"Found ranks that disagree in {calls[0]} on {'; '.join(differing)}; expected the same "
        "value on every rank. Only the number of samples may differ."
    )


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
