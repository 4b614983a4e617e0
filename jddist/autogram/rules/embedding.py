"""Embeddings: every sample reads a few lines of a table, and has gradients there alone."""

from __future__ import annotations

import torch
from torch import nn

from ..blocks import JacobianBlock, LookupBlock, compute_dtype
from ..record import LayerRecord
from .registry import register_rule


@register_rule(nn.Embedding)
def embedding(record: LayerRecord) -> dict[str, JacobianBlock]:
    """The block of ``weight`` [V, d]."""
    (grads,) = record.grads
    module = record.module
    assert grads is not None and isinstance(module, nn.Embedding)
    b, k, width = record.batch, grads.shape[0], module.embedding_dim
    tokens = record.input.reshape(b, -1)
    values = grads.reshape(k, tokens.numel(), width).transpose(0, 1)  # [b * t, k, d]
    lines = tokens.reshape(-1).long()
    samples = torch.arange(b, device=lines.device).repeat_interleave(tokens.shape[1])
    if module.scale_grad_by_freq:
        frequency = torch.bincount(lines, minlength=module.num_embeddings)[lines]
        values = values / frequency[:, None, None].to(values.dtype)
    if module.padding_idx is not None:
        read = lines != module.padding_idx
        samples, lines, values = samples[read], lines[read], values[read]
    return {"weight": LookupBlock(samples, lines, values, b, module.num_embeddings)}


@register_rule(nn.EmbeddingBag)
def embedding_bag(record: LayerRecord) -> dict[str, JacobianBlock] | None:
    """The block of ``weight`` [V, d]: sums and means of lines, weighted or not."""
    (grads,) = record.grads
    module = record.module
    assert grads is not None and isinstance(module, nn.EmbeddingBag)
    if module.mode == "max" or module.scale_grad_by_freq:
        # Which line was the largest is not recorded; torch's scaling of sums depends on the order
        # of the lines in the table (2.13), and autograd alone reproduces it.
        return None
    # The module's own signature: (input, offsets=None, per_sample_weights=None).
    given = dict(zip(("input", "offsets", "per_sample_weights"), record.args, strict=False))
    given.update(record.kwargs)
    tokens, offsets = given["input"], given.get("offsets")
    if tokens.is_nested:
        return None
    lines = tokens.reshape(-1).long()
    if offsets is None:
        bags = torch.arange(len(tokens), device=lines.device).repeat_interleave(tokens.shape[1])
        number = len(tokens)
    else:
        starts = offsets[:-1] if module.include_last_offset else offsets
        places = torch.arange(len(lines), device=lines.device)
        bags = torch.searchsorted(starts.to(lines), places, right=True) - 1
        number = len(starts)
    if record.batched and number != record.batch:
        return None
    scale = torch.ones(len(lines), dtype=compute_dtype(grads), device=lines.device)
    if given.get("per_sample_weights") is not None:
        scale = given["per_sample_weights"].reshape(-1).to(scale.dtype)
    if module.padding_idx is not None:
        read = lines != module.padding_idx
        bags, lines, scale = bags[read], lines[read], scale[read]
    if module.mode == "mean":
        sizes = torch.bincount(bags, minlength=number).clamp(min=1).to(scale.dtype)
        scale = scale / sizes[bags]
    flat = grads.reshape(grads.shape[0], number, module.embedding_dim)
    values = flat[:, bags].transpose(0, 1) * scale[:, None, None]
    samples = bags if record.batched else torch.zeros_like(bags)
    return {"weight": LookupBlock(samples, lines, values, record.batch, module.num_embeddings)}
