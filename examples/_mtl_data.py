"""Three tasks on two overlaid digits, and a network with a head for each task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

TASKS = ("left", "right", "sum")
TRAINING_PAIRS, TEST_PAIRS = 2048, 1024
_HEIGHT, _WIDTH, _SHIFT = 8, 12, 4  # two digits of 8 x 8 share the columns 4 to 7
_TRAINING_DIGITS = 1200  # the others are for the tests' pairs alone
_SUM_MEAN, _SUM_SCALE = 9.0, 4.1  # of the sum of two digits


@dataclass(frozen=True)
class Pairs:
    """Images [n, 1, 8, 12] in [0, 1], and the two digits [n] in each of them."""

    images: Tensor
    left: Tensor
    right: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def at(self, indices: Tensor) -> Pairs:
        return Pairs(self.images[indices], self.left[indices], self.right[indices])


def load_pairs(device: torch.device) -> tuple[Pairs, Pairs]:
    """Pairs for training and for tests, of different digits; the same in every call."""
    digits = load_digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(digits.data), generator=generator)
    images = torch.from_numpy(digits.images)[order] / 16
    labels = torch.from_numpy(digits.target)[order]
    n = _TRAINING_DIGITS
    training = _overlaid(images[:n], labels[:n], TRAINING_PAIRS, generator, device)
    return training, _overlaid(images[n:], labels[n:], TEST_PAIRS, generator, device)


def _overlaid(
    images: Tensor, labels: Tensor, count: int, generator: torch.Generator, device: torch.device
) -> Pairs:
    left, right = torch.randint(len(images), (2, count), generator=generator)
    canvas = torch.zeros(count, 1, _HEIGHT, _WIDTH, dtype=torch.float64)
    canvas[:, 0, :, : _WIDTH - _SHIFT] = images[left]
    canvas[:, 0, :, _SHIFT:] = canvas[:, 0, :, _SHIFT:].maximum(images[right])
    return Pairs(canvas.to(device), labels[left].to(device), labels[right].to(device))


class Network(nn.Module):
    """A convolutional trunk that all tasks share, and a linear head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Tanh()),
            nn.Sequential(nn.Flatten(), nn.Linear(16 * 24, 24), nn.Tanh()),
        )
        self.heads = nn.ModuleDict(
            {"left": nn.Linear(24, 10), "right": nn.Linear(24, 10), "sum": nn.Linear(24, 1)}
        )

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The features, and each task's output."""
        features = self.trunk(images)
        return features, {task: head(features) for task, head in self.heads.items()}


def losses_of(outputs: dict[str, Tensor], pairs: Pairs) -> dict[str, Tensor]:
    """Each task's mean loss: cross-entropies of the digits, the squared error of the sum."""
    target = (pairs.left + pairs.right - _SUM_MEAN) / _SUM_SCALE
    return {
        "left": nn.functional.cross_entropy(outputs["left"], pairs.left),
        "right": nn.functional.cross_entropy(outputs["right"], pairs.right),
        "sum": nn.functional.mse_loss(outputs["sum"].squeeze(1), target),
    }


def errors_of(outputs: dict[str, Tensor], pairs: Pairs) -> dict[str, Tensor]:
    """How many of the pairs each task gets wrong; a sum is wrong if it rounds to another."""
    sums = (outputs["sum"].squeeze(1) * _SUM_SCALE + _SUM_MEAN).round()
    return {
        "left": (outputs["left"].argmax(dim=1) != pairs.left).sum(),
        "right": (outputs["right"].argmax(dim=1) != pairs.right).sum(),
        "sum": (sums != pairs.left + pairs.right).sum(),
    }
