"""Matrix products: the rows of W are sums of outer products g_t a_t^T."""

from __future__ import annotations

from torch import nn

from ..blocks import ColumnOrder, JacobianBlock, OuterBlock
from ..record import LayerRecord
from .registry import register_rule, register_rule_by_name


@register_rule(nn.Linear)
def linear(record: LayerRecord) -> dict[str, JacobianBlock]:
    """Blocks of ``weight`` [out, in] and ``bias`` [out], for any number of middle dimensions."""
    return _blocks(record, transposed=False)


@register_rule_by_name("transformers.pytorch_utils.Conv1D")
def conv1d_of_transformers(record: LayerRecord) -> dict[str, JacobianBlock]:
    """Blocks of ``weight`` [in, out] and ``bias`` [out]: a Linear with its weight transposed."""
    return _blocks(record, transposed=True)


def _blocks(record: LayerRecord, *, transposed: bool) -> dict[str, JacobianBlock]:
    (grads,) = record.grads
    assert grads is not None
    weight, bias = record.module._parameters["weight"], record.module._parameters["bias"]
    assert weight is not None
    in_features, out_features = weight.shape if transposed else weight.shape[::-1]
    k, b = grads.shape[0], record.batch
    t = grads.shape[2:-1].numel()  # a shard may have no features from which to infer it
    grads = grads.reshape(k, b, t, out_features).transpose(0, 1)  # [b, k, t, out]
    order = ColumnOrder((out_features, in_features), (1, 0)) if transposed else None
    blocks: dict[str, JacobianBlock] = {}
    if weight.requires_grad:
        inputs = record.input.reshape(b, t, in_features)
        blocks["weight"] = OuterBlock(inputs, grads, order=order)
    if bias is not None and bias.requires_grad:
        blocks["bias"] = OuterBlock(None, grads, ones=True)
    return blocks
