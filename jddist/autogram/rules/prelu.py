"""PReLU: the rows are sums of g * min(x, 0)."""

from __future__ import annotations

from torch import nn

from ..blocks import DenseBlock, JacobianBlock, compute_dtype
from ..record import LayerRecord
from .registry import register_rule


@register_rule(nn.PReLU)
def prelu(record: LayerRecord) -> dict[str, JacobianBlock]:
    """The block of ``weight``: one slope for all, or one for each channel (dimension 1)."""
    (grads,) = record.grads
    assert grads is not None
    weight, x = record.module._parameters["weight"], record.input
    assert weight is not None
    k, b = grads.shape[0], record.batch
    products = grads.to(compute_dtype(grads)) * x.clamp(max=0)
    if weight.numel() == 1:
        return {"weight": DenseBlock(products.reshape(k, b, -1).sum(2).T.reshape(-1, 1))}
    images = x.shape[0] // b if b and x.ndim > 1 else 1
    shape = (k, b, images, weight.numel(), -1)
    rows = products.reshape(shape).sum(dim=(2, 4))  # [k, b, channels]
    return {"weight": DenseBlock(rows.transpose(0, 1).reshape(-1, weight.numel()))}
