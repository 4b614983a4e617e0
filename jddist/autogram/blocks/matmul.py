"""Products of float32 matrices by the faster of the libraries that PyTorch brings along."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import sqrt

import torch
from torch import Tensor

# Of dense [m, n] and [p, n], or of transposed dense ones: [m, p].
Product = Callable[[Tensor, Tensor], Tensor]

# Multiplications below which oneDNN is not worth the 5 to 20 MiB that its kernels and its copies of
# the factors take: much beside a model of few layers, whose step would be a tenth faster.
SMALL = 1 << 31
# The same for squares of rows, which take more memory than that themselves.
SMALL_SQUARE = 1 << 20
# Results of fewer lines than that do not make up for the copies.
_NARROW = 64
# oneDNN adds up without breaks: its error is that of summands * sqrt(summands). Parts of that many
# times sqrt(summands) leave 4e-7 of the norms, about what MKL leaves.
_PART = 12.0


def times_transposed(
    left: Tensor,
    right: Tensor,
    out: Callable[[], Tensor] | None = None,
    least: int | None = None,
) -> Tensor:
    """``left @ right.T``: [m, n] and [p, n] -> [m, p].

    Args:
        left: [m, n], of any layout.
        right: [p, n], of the same dtype.
        out: Gives memory where the result may be put; it is found in what is returned.
        least: See ``faster_product``.
    """
    product = faster_product(left, right) if least is None else faster_product(left, right, least)
    if product is None:
        return torch.mm(left, right.T) if out is None else torch.mm(left, right.T, out=out())
    total: Tensor | None = None
    for mine, theirs in dense_parts(left, right):
        found = product(mine, theirs)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total


def put_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Overwrites ``target`` [m, p] with ``times_transposed(left, right)``."""
    found = times_transposed(left, right, lambda: target)
    if found is not target:
        target.copy_(found)


def faster_product(left: Tensor, right: Tensor, least: int = SMALL) -> Product | None:
    """A function that multiplies ``dense_parts`` of ``left`` and ``right`` faster than torch.mm.

    ``torch.mm`` calls MKL, which uses half of the vector width of other makers' processors. oneDNN
    uses all of it, and is as fast as MKL elsewhere.

    Args:
        left: [m, n].
        right: [p, n].
        least: Below how many multiplications it is not used.
    """
    (m, n), p = left.shape, right.shape[0]
    suits = (
        m * n * p >= least
        and min(m, p) >= _NARROW
        and left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))
    )
    return _of_onednn() if suits else None


def dense_parts(
    left: Tensor, right: Tensor, columns: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ranges of the columns of both: few enough for oneDNN's rounding, and without gaps between
    the lines, with which it takes a thousand times as long.

    Args:
        left: [m, n].
        right: [p, n].
        columns: How many are added up in all, if both have a part of them only.
    """
    n = left.shape[1]
    count = max(1, round(n / (_PART * sqrt(columns or n))))
    width = -(-n // (64 * count)) * 64  # of one size, which vectors divide
    for start in range(0, n, width):
        part = slice(start, start + width)
        mine = _dense(left[:, part])
        yield mine, mine if left is right else _dense(right[:, part])


def _dense(matrix: Tensor) -> Tensor:
    return matrix if matrix.T.is_contiguous() else matrix.contiguous()


@cache
def _of_onednn() -> Product | None:
    """The product, or None if this build of PyTorch has none. It is no public function: its result
    is looked at once before it is relied on."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return None

    def product(left: Tensor, right: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return found

    # Whatever the defaults are.
    numbers = torch.arange(12, dtype=torch.float32, device="cpu")
    left, right = numbers[:6].view(2, 3), numbers.view(4, 3)
    try:
        agrees = torch.equal(product(left, right), left @ right.T)
        agrees = agrees and torch.equal(product(left.T, right[:2].T), left.T @ right[:2])
    except (AttributeError, RuntimeError, TypeError):
        return None
    return product if agrees else None
