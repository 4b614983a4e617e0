"""The collectives that jddist uses, with numbers that say which rank and place they come from."""

from __future__ import annotations

import sys
import time
from functools import partial

import torch
from torch import Tensor

from jddist._version import __version__
from jddist.distribution.collectives import column_bounds

from .checks import Check, Finding
from .ranks import Ranks

# The numbers that travel are small integers, so sums are exact in any order and dtype.
_DTYPES = (torch.float32, torch.float64)
_COLUMNS = 7
_SPEED_BYTES = 8 << 20
_SPEED_ROUNDS = 3


def collective_checks() -> list[Check]:
    """All of them, in the order in which they should run."""
    return [
        Check("same versions on every rank", _versions),
        Check("small messages (gloo, CPU)", _messages),
        Check("broadcast", _broadcast),
        Check("all-reduce", _all_reduce),
        Check("uneven all-gather", _all_gather),
        Check("uneven all-to-all", _all_to_all),
        Check("reduce-scatter", _reduce_scatter),
        Check("rows to columns and back", _rows_to_columns),
        Check("all-reduce, 8 MiB", _speed),
    ]


def _versions(ranks: Ranks) -> Finding:
    python = ".".join(map(str, sys.version_info[:3]))
    versions = f"Python {python}, torch {torch.__version__}, jddist {__version__}"
    return Finding(same=versions, note=versions)


def _lengths(size: int) -> list[int]:
    """A length for each rank; some have nothing."""
    return [(3 * rank + 2) % 5 for rank in range(size)]


def _numbers(length: int, rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that differ between ranks and places."""
    return torch.arange(length, dtype=dtype, device=device) + 10 * (rank + 1)


def _largest(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not found.numel():
        return 0.0
    return float((found.double() - expected.double()).abs().max())


def _worst(errors: list[float]) -> Finding:
    return Finding(error=max(errors))


def _messages(ranks: Ranks) -> Finding:
    group = ranks.group
    header = torch.tensor([ranks.rank, -(2**62) + ranks.rank])
    expected = torch.tensor([[r, -(2**62) + r] for r in range(ranks.size)])
    wrong = not torch.equal(group.gather_header(header), expected)
    texts = [bytes([r % 251]) * (5 * r + 1) for r in range(ranks.size)]
    wrong |= group.gather_payloads(texts[ranks.rank], [len(t) for t in texts]) != texts
    message = b"from rank 0" if ranks.rank == 0 else None
    wrong |= group.broadcast_payload(message, 11) != b"from rank 0"
    return Finding(error=float(wrong))


def _broadcast(ranks: Ranks) -> Finding:
    errors = []
    for dtype in _DTYPES:
        mine = _numbers(_COLUMNS, ranks.rank, dtype, ranks.device)
        expected = _numbers(_COLUMNS, 0, dtype, ranks.device)
        errors.append(_largest(ranks.group.broadcast(mine), expected))
    return _worst(errors)


def _all_reduce(ranks: Ranks) -> Finding:
    errors = []
    for dtype in _DTYPES:
        numbers = partial(_numbers, _COLUMNS, dtype=dtype, device=ranks.device)
        expected = torch.stack([numbers(r) for r in range(ranks.size)]).sum(dim=0)
        errors.append(_largest(ranks.group.all_reduce(numbers(ranks.rank)), expected))
    return _worst(errors)


def _all_gather(ranks: Ranks) -> Finding:
    lengths = _lengths(ranks.size)
    errors = []
    for dtype in _DTYPES:
        parts = [_numbers(n, r, dtype, ranks.device) for r, n in enumerate(lengths)]
        found = ranks.group.all_gather_uneven(parts[ranks.rank], lengths)
        errors += [_largest(a, b) for a, b in zip(found, parts, strict=True)]
    return _worst(errors)


def _all_to_all(ranks: Ranks) -> Finding:
    def part(sender: int, receiver: int, dtype: torch.dtype) -> Tensor:
        length = (2 * sender + receiver) % 4
        return _numbers(length, sender * ranks.size + receiver, dtype, ranks.device)

    errors = []
    for dtype in _DTYPES:
        sent = [part(ranks.rank, r, dtype) for r in range(ranks.size)]
        expected = [part(r, ranks.rank, dtype) for r in range(ranks.size)]
        found = ranks.group.exchange(sent, [len(e) for e in expected])()
        errors.append(_largest(found, torch.cat(expected)))
    return _worst(errors)


def _reduce_scatter(ranks: Ranks) -> Finding:
    errors = []
    for dtype in _DTYPES:
        # Row r of every rank goes to rank r.
        numbers = partial(_numbers, ranks.size * 3, dtype=dtype, device=ranks.device)
        parts = [numbers(r).view(ranks.size, 3) for r in range(ranks.size)]
        expected = torch.stack(parts).sum(dim=0)[ranks.rank]
        errors.append(_largest(ranks.group.reduce_scatter(parts[ranks.rank]), expected))
    return _worst(errors)


def _rows_to_columns(ranks: Ranks) -> Finding:
    counts, group = _lengths(ranks.size), ranks.group
    errors = []
    for dtype in _DTYPES:
        rows = [
            _numbers(n * _COLUMNS, r, dtype, ranks.device).view(n, _COLUMNS)
            for r, n in enumerate(counts)
        ]
        start, stop = column_bounds(_COLUMNS, ranks.size)[ranks.rank]
        columns = group.rows_to_columns(rows[ranks.rank], counts)
        errors.append(_largest(columns, torch.cat(rows)[:, start:stop]))
        total = torch.cat(rows).sum(dim=0)
        errors.append(_largest(group.gather_columns(total[start:stop], _COLUMNS), total))
    return _worst(errors)


def _speed(ranks: Ranks) -> Finding:
    if ranks.size == 1:
        return Finding(skipped="one rank")
    group = ranks.group
    buffer = torch.zeros(_SPEED_BYTES // 4, device=ranks.device)
    group.all_reduce(buffer)  # the first one makes the connections
    ranks.synchronize()
    started = time.perf_counter()
    for _ in range(_SPEED_ROUNDS):
        group.all_reduce(buffer)
    ranks.synchronize()
    seconds = (time.perf_counter() - started) / _SPEED_ROUNDS
    sent = 2 * (ranks.size - 1) / ranks.size * _SPEED_BYTES
    return Finding(note=f"{sent / seconds / 1e9:.2g} GB/s sent per rank")
