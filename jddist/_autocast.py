"""The arithmetic of the Jacobian keeps its precision inside of a user's autocast region."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICES = ("cpu", "cuda", "xpu")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, no product is cast to bfloat16; also serves as a decorator.

    Losses are often handed over where they were computed, under autocast. Backward passes take the
    dtypes of their forward whatever is switched on now.
    """
    with ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
