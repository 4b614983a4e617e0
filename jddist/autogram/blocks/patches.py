"""The patches of images that a convolution reads, formed when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from .scratch import Scratch


@dataclass(frozen=True)
class Window:
    """How a convolution moves over an image; one entry per spatial dimension.

    Attributes:
        kernel: The size of a patch.
        stride: The step between patches.
        dilation: The step between the elements of a patch.
        padding: What is added before and after the image.
        mode: What the padding holds, in the words of ``torch.nn.functional.pad``.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str = "constant"

    @property
    def is_point(self) -> bool:
        """Whether a patch is one element of the image, and every element is one."""
        ones = (1,) * len(self.kernel)
        return self.kernel == ones and self.stride == ones and not any(map(any, self.padding))

    def padded(self, size: Sequence[int]) -> tuple[int, ...]:
        """The size of the image with its padding."""
        return tuple(
            n + before + after for n, (before, after) in zip(size, self.padding, strict=True)
        )

    def count(self, size: Sequence[int]) -> tuple[int, ...]:
        """The number of patches along each dimension of an image of ``size``."""
        sizes = zip(self.padded(size), self.kernel, self.stride, self.dilation, strict=True)
        return tuple((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in sizes)


class Patches:
    """Patches [b, n * t, K * C] of images [b, n, C, *size], for K elements of the kernel.

    Args:
        images: Each of b samples has n images.
        window: The convolution's geometry.
        count: The number of patches along each dimension, if not all that fit.
    """

    def __init__(
        self, images: Tensor, window: Window, count: tuple[int, ...] | None = None
    ) -> None:
        self._images = images
        self._window = window
        self._size = tuple(images.shape[3:])
        self._count = window.count(self._size) if count is None else count
        self.dtype = images.dtype
        self.device = images.device
        b, n, channels = images.shape[:3]
        features = prod(window.kernel) * channels
        self.shape = torch.Size((b, n * prod(self._count), features))

    def samples(
        self, start: int, stop: int, dtype: torch.dtype, scratch: Scratch | None = None
    ) -> Tensor:
        """The patches of some samples: [stop - start, n * t, K * C], channels innermost.

        Args:
            start: The first sample.
            stop: One past the last sample.
            dtype: The dtype of the result.
            scratch: Where the result may lie, until the next call; None for memory of its own.
        """
        window, shape = self._window, (stop - start, *self.shape[1:])
        images = self._images[start:stop].flatten(0, 1)  # [N, C, *size]
        if window.is_point and self._count == self._size:
            return images.flatten(2).transpose(1, 2).to(dtype).reshape(shape)
        last = self._padded(images, dtype, scratch or Scratch())
        steps = last.stride()
        view = last.as_strided(
            (len(last), *self._count, *window.kernel, last.shape[-1]),
            (
                steps[0],
                *(step * s for step, s in zip(steps[1:-1], window.stride, strict=True)),
                *(step * d for step, d in zip(steps[1:-1], window.dilation, strict=True)),
                1,
            ),
            last.storage_offset(),
        )
        if scratch is None:
            return view.reshape(shape)
        target = scratch.tile("patches", tuple(view.shape), dtype, self.device)
        return target.copy_(view).view(shape)

    def _padded(self, images: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
        """[N, *padded size, C], contiguous."""
        window, dims = self._window, len(self._size)
        if window.mode != "constant":
            flat = [n for pair in reversed(window.padding) for n in pair]
            images = F.pad(images, flat, mode=window.mode)
        padded = window.padded(self._size)
        target = scratch.tile("padded", (len(images), *padded, images.shape[1]), dtype, self.device)
        inner = target
        if window.mode == "constant" and any(map(any, window.padding)):
            target.zero_()
            for dim, (before, _) in enumerate(window.padding):
                inner = inner.narrow(1 + dim, before, self._size[dim])
        inner.copy_(images.permute(0, *range(2, 2 + dims), 1))
        return target
