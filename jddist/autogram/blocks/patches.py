"""The patches of images that a convolution reads, formed when they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


# A grouped convolution forms the rows of a few samples at a time: as many as stay in the cache
# until they are copied, or it takes up to five times as long. With more groups than these, oneDNN
# falls back to slow kernels.
_SAMPLES = 16
_GROUPS = 128
_BYTES = 5 << 18


class Patches:
    """Patches [b, n * t, features] of images [b, n, C, *size].

    The features of a patch are [K, C], for K elements of the kernel, or [C, K] if ``convolves``.

    Args:
        images: Each of b samples has n images.
        window: The convolution's geometry.
        count: The number of patches along each dimension, if not all that fit.
        convolves: Whether rows are formed by convolutions of the library instead, see
            ``can_convolve``.
    """

    def __init__(
        self,
        images: Tensor,
        window: Window,
        count: tuple[int, ...] | None = None,
        *,
        convolves: bool = False,
    ) -> None:
        self._images = images
        self._window = window
        self.convolves = convolves
        self._size = tuple(images.shape[3:])
        self._count = window.count(self._size) if count is None else count
        self.dtype = images.dtype
        self.device = images.device
        b, n, channels = images.shape[:3]
        features = prod(window.kernel) * channels
        self.shape = torch.Size((b, n * prod(self._count), features))

    def numel(self) -> int:
        """The number of elements of the images, which is what is held."""
        return self._images.numel()

    def samples(
        self, start: int, stop: int, dtype: torch.dtype, scratch: Scratch | None = None
    ) -> Tensor:
        """The patches of some samples: [stop - start, n * t, features].

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
        if self.convolves:
            view = view.movedim(-1, 1 + len(self._count))
        if scratch is None:
            return view.reshape(shape)
        target = scratch.tile("patches", tuple(view.shape), dtype, self.device)
        return target.copy_(view).view(shape)

    @staticmethod
    def can_convolve(images: Tensor, window: Window, grads: Tensor, groups: int) -> bool:
        """Whether ``row_tiles`` serves, and is the faster way: on a CPU, in two dimensions.

        Args:
            images: [b, n, C, *size].
            window: The convolution's geometry.
            grads: [b, k, n * t, out].
            groups: The convolution's groups.
        """
        plain = window.mode == "constant" and all(a == b for a, b in window.padding)
        return bool(
            plain
            and grads.shape[1] == 1
            and images.ndim == 5
            and images.shape[1] == 1
            # Convolutions copy rows, products form patches first: of out and of t lines each.
            and (2 * grads.shape[2] >= grads.shape[3] or groups > 1)
            and prod(window.kernel) > 1
            and images.device.type == "cpu"
            and images.dtype == grads.dtype == torch.float32
            and torch.backends.mkldnn.enabled
            and torch.backends.mkldnn.is_available()
        )

    def row_tiles(
        self, grads: Tensor, like: Tensor, groups: int = 1
    ) -> Iterator[tuple[slice, Tensor]]:
        """Rows of some samples at a time, each sample being a group of a convolution.

        Args:
            grads: [b, t, out].
            like: Any tensor of as many elements as the rows; its values are not read.
            groups: The convolution's own groups.

        Yields:
            A range of samples and their rows [n, out, features / groups].
        """
        out, (channels, *size) = grads.shape[2], self._images.shape[2:]
        weight = like.view(len(grads), out, channels // groups, *self._window.kernel)
        fitting = _BYTES * len(grads) // max(1, like.nbytes)
        step = max(1, min(_SAMPLES, _GROUPS // groups, fitting))
        for start in range(0, len(grads), step):
            part = slice(start, min(len(grads), start + step))
            n = part.stop - start
            g = grads[part].transpose(1, 2).reshape(1, n * out, *self._count)
            images = self._images[part].reshape(1, n * channels, *size)
            rows = self._weight_gradient(g, images, weight[part].flatten(0, 1), n * groups)
            yield part, rows.view(n, out, -1)

    def combined(self, grads: Tensor) -> Tensor:
        """The sum of all samples' rows: ``grads`` [b, t, out] -> [out, features]."""
        b, _, out = grads.shape
        images = self._images.flatten(0, 1)
        weight = grads.new_empty(out, images.shape[1], *self._window.kernel)
        g = grads.transpose(1, 2).reshape(b, out, *self._count)
        return self._weight_gradient(g, images, weight, 1).view(out, -1)

    def _weight_gradient(
        self, grads: Tensor, images: Tensor, weight: Tensor, groups: int
    ) -> Tensor:
        window = self._window
        padding = [before for before, _ in window.padding]
        found: Tensor = torch.ops.aten.convolution_backward(
            grads,
            images,
            weight,
            None,
            window.stride,
            padding,
            window.dilation,
            False,
            [0] * len(padding),
            groups,
            [False, True, False],
        )[1]
        return found

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
