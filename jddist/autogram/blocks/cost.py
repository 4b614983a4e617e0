"""Which form of a product of rows is cheaper, from shapes alone.

A and G are the factors of a layer: rows sum over t positions the outer products of G's lines [out]
and A's [in], for k objectives of each of b samples. Costs are in floating-point operations of a
large matrix product. The constants were measured on one thread of a server CPU.
"""

from __future__ import annotations

# What one element of a product of pairs costs besides the two matrix products: it is written
# twice, read twice, multiplied and added up in float64.
_PER_PAIR = 12.0
# By what factor a product of rows, which is skinny, is slower than a square one.
_SKINNY = 1.25
# The share of a Gramian that is computed, its upper triangle left out in bands.
_HALF = 0.65
_THREE_QUARTERS = 0.75


def pairwise_flops(
    b1: int, t1: int, b2: int, t2: int, k: int, in_: int, out: int, *, own: bool = False
) -> float:
    """The cost of (A1 A2^T) * (G1 G2^T), summed over pairs of positions."""
    pairs = float(b1) * t1 * b2 * t2 * (_HALF if own and b1 >= 24 else 1.0)
    return 2.0 * pairs * (in_ + k * k * out) + _PER_PAIR * pairs * k * k


def materialised_flops(
    b1: int, t1: int, b2: int, t2: int, k: int, in_: int, out: int, *, own: bool = False
) -> float:
    """The cost of forming the rows of both sets (of one, if they are its ``own``) and multiplying
    them."""
    forming = 2.0 * k * (b1 * t1 + (0 if own else b2 * t2)) * in_ * out
    share = _THREE_QUARTERS if own and k * b1 >= 24 else 1.0
    return forming + share * _SKINNY * 2.0 * (k * b1) * (k * b2) * in_ * out


def matched_flops(pairs: int, k: int, width: int) -> float:
    """The cost of multiplying ``pairs`` of lines [k, width], each gathered from memory."""
    return float(pairs) * (k * width * (8.0 + 2.0 * k) + 100.0)
