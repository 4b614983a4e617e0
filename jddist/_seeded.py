"""Methods that draw random numbers: from torch's default generator, or from one of their own."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

_KEY = "generator"


class Seeded(nn.Module):
    """Mixin of modules that draw random numbers.

    Attributes:
        generator: What is drawn from; None stands for torch's default generator of the input's
            device. The state of a generator, but not that of torch's default one, is part of the
            module's `state_dict`, and follows the weights from rank 0 to the other ranks.
    """

    generator: torch.Generator | None = None

    def draws_on(self, device: torch.device) -> torch.device:
        """Where to draw for an input on `device`: a generator serves its own device alone."""
        return device if self.generator is None else self.generator.device

    def permutation(self, size: int) -> Tensor:
        """A random permutation of 0 to size - 1, on the host."""
        device = self.draws_on(torch.device("cpu"))
        return torch.randperm(size, generator=self.generator, device=device).cpu()

    @property
    def generator_digest(self) -> str | None:
        """A digest of the generator's state, by which ranks can tell whether theirs agree."""
        if self.generator is None:
            return None
        state = self.generator.get_state().numpy().tobytes()
        return hashlib.blake2b(state, digest_size=8).hexdigest()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.generator is not None:
            destination[prefix + _KEY] = self.generator.get_state()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        # Taken out meanwhile: torch would report it as a key that it does not know.
        state: Tensor | None = state_dict.pop(prefix + _KEY, None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )
        if state is not None:
            state_dict[prefix + _KEY] = state
            if self.generator is None:
                self.generator = torch.Generator()
            self.generator.set_state(state.cpu())
        elif self.generator is not None and strict:
            missing_keys.append(prefix + _KEY)


def draws_from_own_generator(module: nn.Module) -> bool:
    """Whether the module or a part of it has a generator of its own."""
    return any(isinstance(m, Seeded) and m.generator is not None for m in module.modules())
