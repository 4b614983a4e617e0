"""The five models of the speed table, each with a batch of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_VOCABULARY = 1000
_CLASSES = 10


@dataclass(frozen=True)
class Model:
    """A model of the table.

    Attributes:
        title: Its row in the table.
        make: Builds the network, with random weights from torch's default generator.
        inputs: (batch size) -> inputs.
        batch: The batch size.
        must: The largest acceptable ratio to a plain step, book-keeping and second backward.
        peer: Whether the peer is measured too: it holds the Jacobian, of 7 GB for one model.
    """

    title: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batch: int
    must: tuple[float, float]
    peer: bool = True

    def losses(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """One loss per sample: [b]."""
        return F.cross_entropy(model(inputs), targets, reduction="none")

    def data(self, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        size = self.batch if batch is None else batch
        return self.inputs(size), torch.randint(_CLASSES, (size,))


class Block(nn.Module):
    """A pre-norm transformer block: attention with a packed projection, GELU MLP of width 4 d."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        packed = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.project(mixed.transpose(1, 2).reshape(b, t, d))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Transformer(nn.Module):
    """Token embedding, blocks, mean over the positions, linear classifier."""

    def __init__(self, width: int, blocks: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.embedding(x))).mean(1))
        return out


def mlp(width: int = 1024, inputs: int = 784) -> nn.Module:
    """inputs - width - width - 10."""
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, _CLASSES),
    )


def cnn(width: int = 32, size: int = 32) -> nn.Module:
    """3 - 32 - 64 - 128 channels of 3x3, two poolings, then 8192 - 128 - 10."""
    flat = 4 * width * (size // 4) ** 2
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(flat, 128),
        nn.ReLU(),
        nn.Linear(128, _CLASSES),
    )


def vectors(size: int) -> Callable[[int], Tensor]:
    """Normally distributed inputs [b, size]."""
    return lambda batch: torch.randn(batch, size)


def images(size: int) -> Callable[[int], Tensor]:
    """Normally distributed images [b, 3, size, size]."""
    return lambda batch: torch.randn(batch, 3, size, size)


def sentences(length: int) -> Callable[[int], Tensor]:
    """Uniformly distributed tokens [b, length]."""
    return lambda batch: torch.randint(_VOCABULARY, (batch, length))


MODELS: dict[str, Model] = {
    "mlp256": Model("MLP 784-1024-1024-10, b = 256", mlp, vectors(784), 256, (1.5, 1.8)),
    "mlp1024": Model(
        "MLP 784-1024-1024-10, b = 1024", mlp, vectors(784), 1024, (1.85, 2.0), peer=False
    ),
    "cnn": Model("CNN 3-32-64-128 + 8192-128-10, 32x32, b = 64", cnn, images(32), 64, (1.55, 2.15)),
    "transformer192": Model(
        "transformer d = 192, 4 blocks, b = 32, t = 64",
        lambda: Transformer(192),
        sentences(64),
        32,
        (1.75, 2.4),
    ),
    "transformer256": Model(
        "transformer d = 256, 4 blocks, b = 64, t = 128",
        lambda: Transformer(256),
        sentences(128),
        64,
        (1.6, 2.25),
    ),
}
