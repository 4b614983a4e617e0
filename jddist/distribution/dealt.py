"""Weightings that deal out their work: every rank runs them, and solves a share of the problems."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor

from jddist.errors import LayoutMismatchError, RankError
from jddist.linalg._dealing import Dealer, dealing

from .collectives import Group

_OK, _FAILED = 0, 1
_GATHERS, _ENDS = 0, 1


class RankDealer(Dealer):
    """A share for every rank of a group.

    Whatever a rank is about to do, gather or end, it first tells the others and hears of them. So a
    rank that failed in between ends the others too, and none waits for it.
    """

    def __init__(self, group: Group) -> None:
        self.share, self.num_shares = group.rank, group.size
        self.failed = False
        self._group = group

    def gather(self, mine: Tensor, counts: list[int], problems: bytes) -> list[Tensor]:
        self._agree(_GATHERS, None, problems)
        m = mine.shape[1]
        parts = self._group.all_gather_uneven(mine.reshape(-1), [count * m for count in counts])
        return [part.view(-1, m) for part in parts]

    def end(self, error: Exception | None) -> None:
        """Raises RankError on every rank if any had an error."""
        self._agree(_ENDS, error)

    def _agree(self, step: int, error: Exception | None, problems: bytes = b"") -> None:
        message = ("" if error is None else f"{type(error).__name__}: {error}").encode() or b"-"
        status = _OK if error is None else _FAILED
        digest = int.from_bytes(blake2b(problems, digest_size=8).digest(), "little", signed=True)
        header = torch.tensor([status, step, len(message), digest])
        headers = self._group.gather_header(header).tolist()
        failed = [rank for rank, header in enumerate(headers) if header[0] == _FAILED]
        if failed:
            self.failed = True
            texts = self._group.gather_payloads(message, [header[2] for header in headers])
            listed = "; ".join(f"on rank {rank}: {texts[rank].decode()}" for rank in failed)
            raise RankError(f"The weighting failed {listed}") from error
        if len({(header[1], header[3]) for header in headers}) > 1:
            self.failed = True
            raise LayoutMismatchError(
                "Found ranks whose weightings solve different problems; expected the same "
                "weighting, with the same parameters, on every rank."
            )


def run_dealt(
    group: Group, weighting: Callable[[Tensor], Tensor], statistic: Tensor, shape: torch.Size
) -> Tensor:
    """Runs a weighting on every rank, each with a share of its problems.

    Args:
        group: The ranks; all of them have to call.
        weighting: A weighting that deals out its work.
        statistic: What to run it on; the same on every rank.
        shape: The shape of the weights.

    Raises:
        RankError: The weighting failed on some rank.
        LayoutMismatchError: The ranks have different weightings.
    """
    dealer = RankDealer(group)
    error: Exception | None = None
    weights = statistic.new_empty(0)
    try:
        with dealing(dealer):
            weights = weighting(statistic).detach()
        if weights.shape != shape:
            raise ValueError(f"Found weights of shape {tuple(weights.shape)}; expected {shape}.")
    except Exception as failure:
        if dealer.failed:  # raised on every rank already
            raise
        error = failure
    dealer.end(error)
    return weights
