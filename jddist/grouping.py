"""Groups of parameters to aggregate separately: the four strategies of Gradient Vaccine.

Reference: "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
Multilingual Models" (arXiv:2010.05874), which calls them whole_model, enc_dec, all_layer and
all_matrix. Every function returns each trainable parameter exactly once, a tied one with the first
module that holds it, and no empty groups. ``jac_to_grad_groups`` takes what they return.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parameter import Parameter

from .distribution.select import unwrap

Groups = list[list[Parameter]]


def together(model: nn.Module) -> Groups:
    """One group of all parameters (whole_model)."""
    return _groups([unwrap(model).parameters()])


def per_network(model: nn.Module) -> Groups:
    """One group for each child of the model, and one of its own direct parameters (enc_dec)."""
    inner = unwrap(model)
    return _groups(
        [inner.parameters(recurse=False), *(child.parameters() for child in inner.children())]
    )


def per_layer(model: nn.Module) -> Groups:
    """One group for each module with direct parameters (all_layer)."""
    return _groups(module.parameters(recurse=False) for module in unwrap(model).modules())


def per_tensor(model: nn.Module) -> Groups:
    """One group for each parameter (all_matrix)."""
    return _groups([parameter] for parameter in unwrap(model).parameters())


def _groups(candidates: Iterable[Iterable[Parameter]]) -> Groups:
    seen: set[Parameter] = set()
    groups: Groups = []
    for candidate in candidates:
        group = [p for p in dict.fromkeys(candidate) if p.requires_grad and p not in seen]
        seen.update(group)
        if group:
            groups.append(group)
    return groups
