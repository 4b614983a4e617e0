"""Convolutions: outer products of patches and gradients, summed over the patches."""

from __future__ import annotations

from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..blocks import (
    ColumnOrder,
    DenseBlock,
    JacobianBlock,
    OuterBlock,
    Patches,
    Window,
    compute_dtype,
)
from ..record import LayerRecord
from .registry import register_rule

# Elements of patches that exist at a time.
_PATCHES = 1 << 22
_MODES = {"zeros": "constant"}  # the others are named as in torch.nn.functional.pad


@register_rule(nn.Conv1d)
@register_rule(nn.Conv2d)
@register_rule(nn.Conv3d)
def convolution(record: LayerRecord) -> dict[str, JacobianBlock] | None:
    """Blocks of ``weight`` [out, in / groups, *kernel] and ``bias`` [out]."""
    module = cast(_ConvNd, record.module)
    images = _images(record, record.input)
    if images is None:
        return None
    window = Window(
        module.kernel_size,
        module.stride,
        module.dilation,
        _padding(module),
        _MODES.get(module.padding_mode, module.padding_mode),
    )
    grads = _grads(record, module.out_channels)
    fast = Patches.can_convolve(images, window, grads, module.groups)
    patches = Patches(images, window, convolves=fast and module.groups == 1)
    blocks: dict[str, JacobianBlock] = {}
    if module.weight.requires_grad:
        make = _grouped_weight if module.groups > 1 else _weight
        blocks["weight"] = make(patches, grads, module, fast)
    if module.bias is not None and module.bias.requires_grad:
        blocks["bias"] = OuterBlock(None, grads, ones=True)
    return blocks


@register_rule(nn.ConvTranspose1d)
@register_rule(nn.ConvTranspose2d)
@register_rule(nn.ConvTranspose3d)
def transposed_convolution(record: LayerRecord) -> dict[str, JacobianBlock] | None:
    """Blocks of ``weight`` [in, out / groups, *kernel] and ``bias`` [out].

    The gradient plays the image's part: its patches meet the elements of the input.
    """
    module = cast(_ConvTransposeNd, record.module)
    images = _images(record, record.input)
    if images is None or module.groups > 1:
        return None
    grads = _grads(record, module.out_channels)
    blocks: dict[str, JacobianBlock] = {}
    if module.weight.requires_grad:
        padding = tuple((p, p) for p in cast(tuple[int, ...], module.padding))
        window = Window(module.kernel_size, module.stride, module.dilation, padding)
        b, n, channels = images.shape[:3]
        size = tuple(images.shape[3:])
        (g,) = record.grads
        assert g is not None
        k = g.shape[0]
        shape = (b, k * n, module.out_channels, *g.shape[-len(size) :])
        pictures = g.reshape(k, b, n, *shape[2:]).transpose(0, 1).reshape(shape)
        patches = Patches(pictures, window, size).samples(0, b, compute_dtype(g))
        patches = patches.view(b, k, -1, patches.shape[2])
        inputs = images.flatten(3).transpose(2, 3).reshape(b, -1, channels)
        order = ColumnOrder((prod(window.kernel), module.out_channels, channels), (2, 1, 0))
        blocks["weight"] = OuterBlock(inputs, patches, order=order)
    if module.bias is not None and module.bias.requires_grad:
        blocks["bias"] = OuterBlock(None, grads, ones=True)
    return blocks


def _weight(patches: Patches, grads: Tensor, module: _ConvNd, fast: bool) -> JacobianBlock:
    taps = prod(module.kernel_size)
    if fast or taps == 1:
        return OuterBlock(patches, grads)
    shape = (module.out_channels, taps, module.in_channels)
    return OuterBlock(patches, grads, order=ColumnOrder(shape, (0, 2, 1)))


def _grouped_weight(patches: Patches, grads: Tensor, module: _ConvNd, fast: bool) -> JacobianBlock:
    """Rows as they are: groups make them short."""
    b, k, t, out = grads.shape
    groups, taps = module.groups, prod(module.kernel_size)
    dtype = torch.promote_types(compute_dtype(grads), patches.dtype)
    rows = torch.empty(b * k, module.weight.numel(), dtype=dtype, device=grads.device)
    if fast:
        for part, tile in patches.row_tiles(grads[:, 0], rows, groups):
            rows[part] = tile.flatten(1)
        return DenseBlock(rows)
    step = max(1, _PATCHES // max(1, prod(patches.shape[1:])))
    for low in range(0, b, step):
        high = min(b, low + step)
        a = patches.samples(low, high, dtype).view(high - low, t, taps, groups, -1)
        g = grads[low:high].to(dtype).reshape(high - low, k, t, groups, -1)
        tile = torch.einsum("bkpgo,bptgc->bkgoct", g, a)
        rows[low * k : high * k] = tile.reshape((high - low) * k, -1)
    return DenseBlock(rows)


def _images(record: LayerRecord, x: Tensor) -> Tensor | None:
    """[b, n, channels, *size], or None if the call has no dimension for the samples."""
    dims = len(cast(_ConvNd, record.module).kernel_size)
    if x.ndim == dims + 1:
        return None if record.batched else x[None, None]
    return x.unsqueeze(1) if record.batched else x.unsqueeze(0)


def _grads(record: LayerRecord, channels: int) -> Tensor:
    """[b, k, n * positions, channels]."""
    (grads,) = record.grads
    assert grads is not None
    dims = len(cast(_ConvNd, record.module).kernel_size)
    positions = grads.shape[grads.ndim - dims :].numel()
    shape = (grads.shape[0], record.batch, -1, channels, positions)
    g = grads.reshape(shape).transpose(0, 1)  # [b, k, n, channels, positions]
    return g.transpose(3, 4).flatten(2, 3)


def _padding(module: _ConvNd) -> tuple[tuple[int, int], ...]:
    """Before and after each spatial dimension, whatever way it was given."""
    flat = module._reversed_padding_repeated_twice
    pairs = [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]
    return tuple(reversed(pairs))
