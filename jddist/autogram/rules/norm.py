"""Normalisation layers: the weight's rows are sums of g * x_hat, the bias's sums of g."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm

from ..blocks import DenseBlock, JacobianBlock, compute_dtype
from ..record import LayerRecord
from .registry import register_rule


@register_rule(nn.LayerNorm)
def layer_norm(record: LayerRecord) -> dict[str, JacobianBlock]:
    """Blocks of ``weight`` and ``bias``, both of the normalised shape."""
    module, x = record.module, _input(record)
    assert isinstance(module, nn.LayerNorm)
    return _trailing(record, F.layer_norm(x, module.normalized_shape, eps=module.eps))


@register_rule(nn.RMSNorm)
def rms_norm(record: LayerRecord) -> dict[str, JacobianBlock]:
    """The block of ``weight``, of the normalised shape."""
    module, x = record.module, _input(record)
    assert isinstance(module, nn.RMSNorm)
    eps = torch.finfo(record.input.dtype).eps if module.eps is None else module.eps
    return _trailing(record, F.rms_norm(x, module.normalized_shape, eps=eps))


@register_rule(nn.GroupNorm)
def group_norm(record: LayerRecord) -> dict[str, JacobianBlock]:
    """Blocks of ``weight`` and ``bias`` [channels]."""
    module, x = record.module, _input(record)
    assert isinstance(module, nn.GroupNorm)
    return _channels(record, F.group_norm(x, module.num_groups, eps=module.eps), channel=1)


@register_rule(nn.InstanceNorm1d)
@register_rule(nn.InstanceNorm2d)
@register_rule(nn.InstanceNorm3d)
def instance_norm(record: LayerRecord) -> dict[str, JacobianBlock] | None:
    """Blocks of ``weight`` and ``bias`` [channels]."""
    module, x = record.module, _input(record)
    assert isinstance(module, _InstanceNorm)
    channel = x.ndim - module._get_no_batch_dim()
    if channel == 0 and record.batched:
        return None  # what looks like the samples are the channels
    running = module.track_running_stats and not record.call.training
    if running:
        mean, variance = module.running_mean, module.running_var
        assert mean is not None and variance is not None
        shape = (-1, *[1] * (x.ndim - channel - 1))
        mean, variance = mean.to(x.dtype).view(shape), variance.to(x.dtype).view(shape)
        normal = (x - mean) * torch.rsqrt(variance + module.eps)
    elif module.track_running_stats:
        return None  # running it again must not count twice
    else:
        whole = x if channel == 1 else x.unsqueeze(0)
        normal = F.instance_norm(whole, eps=module.eps).view_as(x)
    return _channels(record, normal, channel)


def _input(record: LayerRecord) -> Tensor:
    """The input in the dtype in which statistics are computed."""
    return record.input.to(compute_dtype(record.input))


def _trailing(record: LayerRecord, normal: Tensor) -> dict[str, JacobianBlock]:
    """Blocks of parameters that have the shape of the last dimensions of ``normal``."""
    (grads,) = record.grads
    assert grads is not None
    b, k = record.batch, grads.shape[0]
    weight = record.module._parameters["weight"]
    assert weight is not None
    shape = (b, -1, weight.numel())
    g, n = grads.reshape(k, *shape), normal.reshape(shape)
    return _blocks(record, g.to(n.dtype), n, dim=2)


def _channels(record: LayerRecord, normal: Tensor, channel: int) -> dict[str, JacobianBlock]:
    """Blocks of parameters that have one element per channel of ``normal``."""
    (grads,) = record.grads
    assert grads is not None
    k, channels = grads.shape[0], normal.shape[channel]
    before = normal.shape[:channel].numel()
    images = before // record.batch if record.batch else 1
    shape = (record.batch, images, channels, -1)
    n = normal.reshape(shape).transpose(1, 2).flatten(2)  # [b, channels, positions]
    g = grads.reshape(k, *shape).transpose(2, 3).flatten(3)
    return _blocks(record, g.to(n.dtype), n, dim=3)


def _blocks(record: LayerRecord, g: Tensor, normal: Tensor, dim: int) -> dict[str, JacobianBlock]:
    """Sums over dimension ``dim`` of ``g`` [k, b, ...]."""
    blocks: dict[str, JacobianBlock] = {}
    for name, parameter in record.module._parameters.items():
        if parameter is None or not parameter.requires_grad:
            continue
        rows = (g * normal if name == "weight" else g).sum(dim=dim)  # [k, b, p]
        blocks[name] = DenseBlock(rows.transpose(0, 1).reshape(-1, parameter.numel()))
    return blocks
