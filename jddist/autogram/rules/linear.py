"""The closed form of ``nn.Linear``: the rows of W are sums of outer products g_t a_t^T."""

from __future__ import annotations

from torch import nn

from ..blocks import JacobianBlock, OuterBlock
from ..record import LayerRecord
from .registry import register_rule


@register_rule(nn.Linear)
def linear(record: LayerRecord) -> dict[str, JacobianBlock]:
    """Blocks of ``weight`` [out, in] and ``bias`` [out], for any number of middle dimensions."""
    (grads,) = record.grads
    assert grads is not None
    inputs = record.args[0] if record.args else record.kwargs["input"]
    weight, bias = record.module._parameters["weight"], record.module._parameters["bias"]
    assert weight is not None
    out_features, in_features = weight.shape
    k, b = grads.shape[0], record.batch
    grads = grads.reshape(k, b, -1, out_features).transpose(0, 1)  # [b, k, t, out]
    blocks: dict[str, JacobianBlock] = {}
    if weight.requires_grad:
        blocks["weight"] = OuterBlock(inputs.reshape(b, -1, in_features), grads)
    if bias is not None and bias.requires_grad:
        blocks["bias"] = OuterBlock(None, grads, ones=True)
    return blocks
