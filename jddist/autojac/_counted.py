"""``count=`` of ``backward`` and ``jac``: means over all samples instead of means over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import Partial

from jddist.distribution.base import Distribution
from jddist.distribution.counts import Count, checked_count, shares_of_samples
from jddist.distribution.exchange import scale_rows

from ._context import stated_objectives


def number_of_rows(outputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None) -> int:
    """One for each element of the outputs, or for each given cotangent."""
    return sum(o.numel() for o in outputs) if cotangents is None else len(cotangents[0])


def counts_of(count: Count | None, num_rows: int, distribution: Distribution) -> list[float] | None:
    """``count`` as one number per row.

    Raises:
        ValueError: See ``checked_count``.
    """
    if distribution.objectives is None and distribution.group.size == 1:
        return checked_count(count, num_rows, Partial("avg"))
    return checked_count(count, num_rows, stated_objectives(distribution))


def counted_rows(
    call: str,
    rows: Sequence[Tensor],
    counts: list[float] | None,
    distribution: Distribution,
    error: Exception | None,
) -> list[Tensor]:
    """This rank's rows times its shares of the samples; the ranks tell one another their counts.

    Args:
        call: The public function under way.
        rows: [m, ...] each.
        counts: One for each row.
        distribution: The ranks, all of which call with ``count=``.
        error: What this rank already ran into, for the others to hear.
    """
    agree = {"number of rows": None if counts is None else len(counts)}
    infos = distribution.handshake(call, agree, {"count": counts}, error)
    assert counts is not None
    shares = shares_of_samples([info["count"] for info in infos], len(counts))
    share = torch.tensor(shares[distribution.group.rank], dtype=torch.float64)
    return [scale_rows(r, share.to(r.device)) for r in rows]
