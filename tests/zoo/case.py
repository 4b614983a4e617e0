"""What a test needs to know about one architecture of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """An architecture, its data and its objectives; everything in float64.

    Attributes:
        name: How the tests call it.
        make: Builds the model, with random weights from torch's default generator.
        make_batch: (b, generator) -> tensors that all have the samples first.
        losses: (model, batch) -> one loss per sample [b], or per sample and task [b, tasks].
        batch_dim_ok: Whether the engine takes it with a batch dimension.
        none_ok: Whether the engine takes it without one.
        empty_ok: Whether its forward takes an empty batch.
        announced: Whether the engine has to say that it takes the slow way, one backward pass per
            objective, for some parameter (with a batch dimension).
        random: Whether its forward draws random numbers, so that a batch split over ranks cannot
            give the same losses.
        training: The mode in which it is tested.
        tolerance: The relative error that rounding explains; 1e-10 in float64 throughout.
    """

    name: str
    make: Callable[[], nn.Module]
    make_batch: Callable[[int, torch.Generator], Batch]
    losses: Callable[[nn.Module, Batch], Tensor]
    batch_dim_ok: bool = True
    none_ok: bool = True
    empty_ok: bool = True
    announced: bool = False
    random: bool = False
    training: bool = True
    tolerance: float = 1e-10

    def model(self, seed: int = 0) -> nn.Module:
        """The model in float64 and in the case's mode; the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().double().train(self.training)

    def batch(self, size: int, seed: int = 0) -> Batch:
        """``size`` samples, the same for the same size and seed."""
        return self.make_batch(size, torch.Generator().manual_seed(seed))

    def split(self, batch: Batch, sizes: Sequence[int]) -> list[Batch]:
        """Cuts a batch into one per rank, in rank order."""
        pieces = {name: tensor.split(list(sizes)) for name, tensor in batch.items()}
        return [{name: parts[r] for name, parts in pieces.items()} for r in range(len(sizes))]


def per_sample(*outputs: Tensor) -> Tensor:
    """One smooth loss per sample of outputs [b, ...]: [b]."""
    return torch.stack([_loss(output.unsqueeze(1).flatten(1)) for output in outputs]).sum(0)


def _loss(features: Tensor) -> Tensor:
    return (0.5 * features.square() + features.sin()).mean(1)


def normal(*shape: int, name: str = "x") -> Callable[[int, torch.Generator], Batch]:
    """Batches of one normally distributed tensor [b, *shape]."""

    def make(size: int, generator: torch.Generator) -> Batch:
        return {name: torch.randn(size, *shape, generator=generator, dtype=torch.float64)}

    return make


def tokens(
    length: int, vocabulary: int, name: str = "x"
) -> Callable[[int, torch.Generator], Batch]:
    """Batches of token numbers [b, length], with repetitions."""

    def make(size: int, generator: torch.Generator) -> Batch:
        return {name: torch.randint(vocabulary, (size, length), generator=generator)}

    return make


def on_x(model: nn.Module, batch: Batch) -> Tensor:
    """The losses of a model with one input and one output."""
    return per_sample(model(batch["x"]))
