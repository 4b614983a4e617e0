"""A group of ranks and the few collectives that jddist needs; nothing else calls any.

With one rank every operation is the identity, so one process takes the same path as many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from . import stalls
from .buffers import Buffers

# torch 2.13 renamed these two; older versions have the old names alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_sent = 0.0


def bytes_sent() -> float:
    """Bytes that this process has sent by jddist's collectives so far, by the ring convention.

    all_gather (W-1) * input, reduce_scatter (W-1)/W * input, all_reduce 2 (W-1)/W * size,
    all_to_all what leaves the rank, broadcast the size on rank 0. What a wrapper sends by itself is
    not among them.
    """
    return _sent


class Group:
    """Some ranks of a process group, with this rank among them.

    Args:
        process_group: The process group, or None for this process alone.

    Attributes:
        buffers: Memory for messages.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.process_group = process_group
        self.size = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.buffers = Buffers()
        self._control = process_group
        if self.size > 1 and dist.get_backend(process_group) != "gloo":
            # Row counts, shapes and error messages travel between hosts' memories: over NCCL they
            # would cost a device synchronisation each.
            ranks = dist.get_process_group_ranks(process_group)
            self._control = dist.new_group(
                ranks,
                backend="gloo",
                timeout=timeout_of(process_group),
                use_local_synchronization=True,
            )
        self._members: list[int] = []
        if self.size > 1:
            assert process_group is not None
            self._members = dist.get_process_group_ranks(process_group)
            timeout = timeout_of(process_group)
            stalls.start(None if timeout is None else timeout.total_seconds())

    def naming(self) -> AbstractContextManager[None]:
        """Within this context, a collective that fails names the rank that lags, and its stage."""
        return stalls.naming(self._members) if self.size > 1 else nullcontext()

    def _count(self, tensor: Tensor, times: float, own: int = 0) -> None:
        """Counts a message of ``tensor``, ``times`` over, less ``own`` numbers that stay here."""
        global _sent
        _sent += times * (tensor.numel() - own) * tensor.element_size()

    def gather_header(self, header: Tensor) -> Tensor:
        """Every rank's int64 CPU vector [h], stacked: [W, h]."""
        if self.size == 1:
            return header.unsqueeze(0)
        self._count(header, self.size - 1)
        gathered = header.new_empty(self.size * len(header))
        with self.naming():
            _all_gather(gathered, header, group=self._control)
        return gathered.view(self.size, -1)

    def gather_payloads(self, payload: bytes, lengths: Sequence[int]) -> list[bytes]:
        """Every rank's bytes, whose lengths are known already."""
        if self.size == 1:
            return [payload]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        self._count(padded, self.size - 1)
        gathered = torch.empty(self.size * len(padded), dtype=torch.uint8)
        with self.naming():
            _all_gather(gathered, padded, group=self._control)
        rows = gathered.view(self.size, -1)
        return [row[:n].numpy().tobytes() for row, n in zip(rows, lengths, strict=True)]

    def broadcast_payload(self, payload: bytes | None, length: int) -> bytes:
        """Rank 0's bytes, of a length that every rank knows."""
        if self.size == 1:
            assert payload is not None
            return payload
        buffer = torch.zeros(length, dtype=torch.uint8)
        if payload is not None:
            buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        self._count(buffer, self.rank == 0)
        with self.naming():
            dist.broadcast(buffer, group=self._control, group_src=0)
        return buffer.numpy().tobytes()

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, in place."""
        if self.size > 1:
            self._count(tensor, self.rank == 0)
            with self.naming():
                dist.broadcast(tensor, group=self.process_group, group_src=0)
        return tensor

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            self._count(tensor, 2 * (self.size - 1) / self.size)
            with self.naming():
                dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], Tensor]:
        """``all_reduce`` in the background; the function waits for the sum."""
        if self.size == 1:
            return lambda: tensor
        self._count(tensor, 2 * (self.size - 1) / self.size)
        with self.naming():
            work = dist.all_reduce(tensor, group=self.process_group, async_op=True)

        def wait() -> Tensor:
            with self.naming():
                work.wait()
            return tensor

        return wait

    def all_gather_uneven(self, tensor: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Every rank's vector; their lengths may differ, and are known already.

        gloo has no uneven all-gather: the vectors are padded to the longest.
        """
        if self.size == 1:
            return [tensor]
        longest = max(lengths)
        padded = tensor
        if len(tensor) < longest:
            padded = tensor.new_zeros(longest)
            padded[: len(tensor)] = tensor
        self._count(padded, self.size - 1)
        gathered = tensor.new_empty(self.size * longest)
        with self.naming():
            _all_gather(gathered, padded.contiguous(), group=self.process_group)
        return [row[:n] for row, n in zip(gathered.view(self.size, -1), lengths, strict=True)]

    def exchange(self, sent: Sequence[Tensor], lengths: Sequence[int]) -> Callable[[], Tensor]:
        """Sends the vector ``sent[r]`` to each rank r, in the background.

        Args:
            sent: One vector for each rank, this one included, of one dtype.
            lengths: The lengths of the vectors that come from each rank.

        Returns:
            A function that waits for the vectors of all ranks and returns them, joined. They are
            one of the group's ``buffers``, which may be given back.
        """
        if self.size == 1:
            return lambda: sent[0]
        parts = [part for part in sent if len(part)]
        joined = parts[0] if len(parts) == 1 else torch.cat(list(sent))
        return self.start_all_to_all(joined, [len(part) for part in sent], lengths)

    def start_all_to_all(
        self, joined: Tensor, sent: Sequence[int], lengths: Sequence[int]
    ) -> Callable[[], Tensor]:
        """``exchange`` of vectors that lie one behind the other.

        Args:
            joined: The vectors for all ranks, with several ranks.
            sent: Their lengths.
            lengths: The lengths of the vectors that come from each rank.
        """
        self._count(joined, 1.0, own=sent[self.rank])
        received = self.buffers.take(sum(lengths), joined.dtype, joined.device)
        with self.naming():
            work = dist.all_to_all_single(
                received,
                joined,
                list(lengths),
                list(sent),
                group=self.process_group,
                async_op=True,
            )

        def wait() -> Tensor:
            with self.naming():
                work.wait()
            return received

        return wait

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """From every rank's parts [W, ...] to the sum over ranks of this rank's part."""
        if self.size == 1:
            return parts[0]
        self._count(parts, (self.size - 1) / self.size)
        received = torch.empty_like(parts[0])
        with self.naming():
            _reduce_scatter(received.view(-1), parts.reshape(-1), group=self.process_group)
        return received

    def rows_to_columns(self, rows: Tensor, row_counts: Sequence[int]) -> Tensor:
        """From every rank's rows [m_r, p] to this rank's columns of all rows [M, p_r]."""
        return self.start_rows_to_columns([rows], row_counts, rows.dtype)()

    def start_rows_to_columns(
        self, pieces: Sequence[Tensor], row_counts: Sequence[int], dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        """``rows_to_columns`` in the background; the function waits for the columns.

        Args:
            pieces: Some columns each of this rank's rows, side by side: [m_r, p_i].
            row_counts: m of each rank.
            dtype: The dtype in which they travel.

        Returns:
            A function that returns the columns, in one of the group's ``buffers``.
        """
        if self.size == 1:
            rows = torch.cat([piece.to(dtype) for piece in pieces], dim=1)
            return lambda: rows
        m, device = row_counts[self.rank], pieces[0].device
        bounds = column_bounds(sum(piece.shape[1] for piece in pieces), self.size)
        widths = [stop - start for start, stop in bounds]
        joined = self.buffers.take(m * sum(widths), dtype, device)
        sent = [m * width for width in widths]
        for (start, stop), part in zip(bounds, joined.split(sent), strict=True):
            _fill(part.view(m, stop - start), pieces, start)
        wait = self.start_all_to_all(joined, sent, [n * widths[self.rank] for n in row_counts])

        def finish() -> Tensor:
            columns = wait()
            self.buffers.give_back(joined)
            return columns.view(sum(row_counts), widths[self.rank])

        return finish

    def reduce_columns(self, rows: Tensor) -> Tensor:
        """From every rank's estimate [m, p] of the same rows to this rank's columns of the sum."""
        if self.size == 1:
            return rows
        m, p = rows.shape
        bounds = column_bounds(p, self.size)
        sent = rows.new_zeros(self.size, m, -(-p // self.size))
        for r, (start, stop) in enumerate(bounds):
            sent[r, :, : stop - start] = rows[:, start:stop]
        start, stop = bounds[self.rank]
        return self.reduce_scatter(sent)[:, : stop - start]

    def gather_columns(self, columns: Tensor, total: int) -> Tensor:
        """From every rank's part [p_r] of a vector to the whole vector [p]."""
        if self.size == 1:
            return columns
        widths = [stop - start for start, stop in column_bounds(total, self.size)]
        return torch.cat(self.all_gather_uneven(columns, widths))


def _fill(target: Tensor, pieces: Sequence[Tensor], start: int) -> None:
    """Copies to ``target`` [m, w] the columns from ``start`` on of all ``pieces`` [m, p_i]."""
    stop, offset = start + target.shape[1], 0
    for piece in pieces:
        low, high = max(start, offset), min(stop, offset + piece.shape[1])
        if low < high:
            target[:, low - start : high - start] = piece[:, low - offset : high - offset]
        offset += piece.shape[1]


def timeout_of(process_group: dist.ProcessGroup | None) -> timedelta | None:
    """After what time the collectives of a group give up; None where torch does not say."""
    try:
        backend = process_group._get_backend(process_group._device_types[0])  # type: ignore
        found = backend.options._timeout
    except (AttributeError, RuntimeError):
        return None
    return found if isinstance(found, timedelta) else None


def column_bounds(total: int, parts: int) -> list[tuple[int, int]]:
    """How ``total`` columns are cut into ``parts`` shards: the first ones full, the last short."""
    width = -(-total // parts)
    return [(min(total, r * width), min(total, (r + 1) * width)) for r in range(parts)]
