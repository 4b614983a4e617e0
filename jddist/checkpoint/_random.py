"""Random states: that of every rank, and the one that ranks share if they were seeded alike."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """The default generators of this process: torch's, its current accelerator's, Python's and
    NumPy's."""
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [str(name), np.asarray(keys).tolist(), *rest],
    }
    device = _accelerator()
    if device is not None:
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    """Sets the generators of this process to what ``capture`` found."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    device = _accelerator()
    if device is not None and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"])


def digest(state: dict[str, Any]) -> str:
    """Equal for equal streams of torch's default generator, from which weightings draw."""
    return hashlib.blake2b(state["torch"].numpy().tobytes(), digest_size=16).hexdigest()


def seed_anew(shared: dict[str, Any], rank: int) -> None:
    """Streams of its own for a rank that did not exist before, the same at every resume."""
    content = shared["torch"].numpy().tobytes() + rank.to_bytes(8, "little")
    seed = int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "little")
    torch.manual_seed(seed)  # the accelerators' too
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
