"""The four groupings: every trainable parameter exactly once, in the groups of the paper."""

from __future__ import annotations

import torch
from torch import nn

from jddist.grouping import per_layer, per_network, per_tensor, together


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.encoder = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3))
        self.decoder = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.decoder.weight = self.encoder[2].weight  # tied


def _names(model: nn.Module, groups: list[list[nn.Parameter]]) -> list[list[str]]:
    names = {p: name for name, p in model.named_parameters()}
    return [[names[p] for p in group] for group in groups]


ENCODER = ["encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias"]


def test_groupings() -> None:
    model = _Model()
    assert _names(model, together(model)) == [["scale", *ENCODER, "decoder.bias"]]
    assert _names(model, per_network(model)) == [["scale"], ENCODER, ["decoder.bias"]]
    assert _names(model, per_layer(model)) == [
        ["scale"],
        ENCODER[:2],
        ENCODER[2:],
        ["decoder.bias"],
    ]
    assert _names(model, per_tensor(model)) == [[n] for n in ["scale", *ENCODER, "decoder.bias"]]


def test_a_model_without_trainable_parameters_has_no_groups() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    for grouping in (together, per_network, per_layer, per_tensor):
        assert grouping(model) == []
