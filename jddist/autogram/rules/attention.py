"""Multi-head attention: Linear layers around a function of the projected inputs.

The attention between the projections runs once more, for the whole batch: only its inputs and
outputs tell the projections' rows. Identity matrices stand for the projections in that run.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import DenseBlock, JacobianBlock, OuterBlock, sum_blocks
from ..capture import paused
from ..record import LayerRecord
from .fallback import as_recorded
from .registry import register_rule

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


@register_rule(nn.MultiheadAttention, replays=True)
def multihead_attention(record: LayerRecord) -> dict[str, JacobianBlock] | None:
    """Blocks of all projections, and of ``bias_k`` and ``bias_v``."""
    module = record.module
    assert isinstance(module, nn.MultiheadAttention)
    given = _SIGNATURE.bind(module, *record.args, **record.kwargs)
    given.apply_defaults()
    call = given.arguments
    inputs: list[Tensor] = [call["query"], call["key"], call["value"]]
    plain = inputs[0].ndim == 3 and not any(x.is_nested for x in inputs)
    if not plain or record.call.autocast.enabled or (record.batched and not module.batch_first):
        return None
    if module.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]  # [t, n, features]
    weights, biases = _projections(module)
    projected = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    extra = [b for b in (module.bias_k, module.bias_v) if b is not None]
    appended = [b.detach().repeat(1, inputs[0].shape[1], 1) for b in extra]
    leaves = [leaf.detach().requires_grad_() for leaf in (*projected, *appended)]
    with paused(), as_recorded(record.call), torch.enable_grad():
        outputs = _attend(module, leaves, call, record.call.training)
    mixed = outputs[0].detach()
    out_grads, cotangents = _cotangents(record, module)
    grads = _pull_back(outputs, leaves, cotangents)
    blocks: dict[str, JacobianBlock] = {}
    g = _by_sample(out_grads, record)
    blocks["out_proj.weight"] = OuterBlock(_inputs_by_sample(mixed, record), g)
    if module.out_proj.bias is not None:
        blocks["out_proj.bias"] = OuterBlock(None, g, ones=True)
    by_sample = [_by_sample(grad, record) for grad in grads]
    blocks.update(_projection_blocks(module, inputs, by_sample[:3], record))
    for name, grad in zip(("bias_k", "bias_v"), by_sample[3:], strict=False):
        blocks[name] = DenseBlock(_sums(grad))
    wanted = {name for name, p in module.named_parameters() if p.requires_grad}
    return {name: block for name, block in blocks.items() if name in wanted}


def _projections(module: nn.MultiheadAttention) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases of the queries', keys' and values' projections."""
    if module.in_proj_weight is not None:
        weights = list(module.in_proj_weight.chunk(3))
    else:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    bias = module.in_proj_bias
    return weights, [None] * 3 if bias is None else list(bias.chunk(3))


def _attend(
    module: nn.MultiheadAttention, leaves: list[Tensor], call: dict[str, Any], training: bool
) -> list[Tensor]:
    """The attention between the projections: [t, n, E], and the attention weights if wanted."""
    query, key, value = leaves[:3]
    masks = {name: call[name] for name in ("key_padding_mask", "attn_mask")}
    if len(leaves) > 3:
        # Appended here, one for each sample: the function would share them.
        key, value = torch.cat([key, leaves[3]]), torch.cat([value, leaves[4]])
        masks = {name: m if m is None else F.pad(m, (0, 1)) for name, m in masks.items()}
    identity = torch.eye(module.embed_dim, dtype=query.dtype, device=query.device)
    output, weights = F.multi_head_attention_forward(
        query,
        key,
        value,
        module.embed_dim,
        module.num_heads,
        None,
        None,
        None,
        None,
        module.add_zero_attn,
        module.dropout,
        identity,
        None,
        training=training,
        need_weights=call["need_weights"],
        use_separate_proj_weight=True,
        q_proj_weight=identity,
        k_proj_weight=identity,
        v_proj_weight=identity,
        average_attn_weights=call["average_attn_weights"],
        is_causal=call["is_causal"],
        **masks,
    )
    return [output] if weights is None else [output, weights]


def _cotangents(
    record: LayerRecord, module: nn.MultiheadAttention
) -> tuple[Tensor, list[Tensor | None]]:
    """The output's gradient [k, t, n, E], and the gradients of what ``_attend`` returns."""
    present = next(g for g in record.grads if g is not None)
    whole = [g if g is None or record.batched else g[:, 0] for g in record.grads]
    output = whole[0]
    if output is None:
        shape = record.call.output_shapes[0]
        output = present.new_zeros(len(present), *shape)
    if module.batch_first:
        output = output.transpose(1, 2)
    return output, [output @ module.out_proj.weight.to(output.dtype), *whole[1:]]


def _pull_back(
    outputs: list[Tensor], leaves: list[Tensor], cotangents: list[Tensor | None]
) -> list[Tensor]:
    """Gradients [k, *shape] of the leaves, objective by objective."""
    pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=False) if g is not None]
    rows: list[list[Tensor]] = []
    for j in range(len(pairs[0][1])):
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            leaves,
            [g[j] for _, g in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        rows.append(
            [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
        )
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _projection_blocks(
    module: nn.MultiheadAttention,
    inputs: list[Tensor],
    grads: list[Tensor],
    record: LayerRecord,
) -> dict[str, JacobianBlock]:
    blocks: dict[str, JacobianBlock] = {}
    rows = [_inputs_by_sample(x, record) for x in inputs]
    if module.in_proj_bias is not None:
        blocks["in_proj_bias"] = DenseBlock(torch.cat([_sums(g) for g in grads], dim=1))
    if module.in_proj_weight is None:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        separate = zip(names, rows, grads, strict=True)
        return blocks | {name: OuterBlock(a, g) for name, a, g in separate}
    if _is_same(inputs[0], inputs[1]) and _is_same(inputs[1], inputs[2]):
        blocks["in_proj_weight"] = OuterBlock(rows[0], torch.cat(grads, dim=3))
        return blocks
    width = module.embed_dim
    parts = [
        # Each input meets its third of the weight's lines.
        OuterBlock(a, F.pad(g, (i * width, (2 - i) * width)))
        for i, (a, g) in enumerate(zip(rows, grads, strict=True))
    ]
    blocks["in_proj_weight"] = sum_blocks(parts)
    return blocks


def _is_same(one: Tensor, two: Tensor) -> bool:
    """Whether both are one tensor (the record holds a copy of the handle for each argument)."""
    same_place = one.data_ptr() == two.data_ptr() and one.dtype == two.dtype
    return same_place and one.shape == two.shape and one.stride() == two.stride()


def _inputs_by_sample(x: Tensor, record: LayerRecord) -> Tensor:
    """[t, n, features] -> [b, positions, features]."""
    return x.transpose(0, 1) if record.batched else x.reshape(1, -1, x.shape[2])


def _by_sample(grads: Tensor, record: LayerRecord) -> Tensor:
    """[k, t, n, features] -> [b, k, positions, features]."""
    if record.batched:
        return grads.permute(2, 0, 1, 3)
    return grads.flatten(1, 2).unsqueeze(0)


def _sums(grads: Tensor) -> Tensor:
    """[b, k, positions, features] -> [b * k, features]."""
    return grads.sum(dim=2).flatten(0, 1)
