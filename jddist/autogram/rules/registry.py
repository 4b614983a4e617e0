"""Which closed-form rule serves which layer.

A rule turns one call of a layer into one JacobianBlock per parameter. It is chosen by walking the
layer's MRO, because sharding wrappers give a layer a new class (``FSDPLinear``), and is used only
if the layer still computes what the registered class does.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..blocks import JacobianBlock
from ..record import LayerRecord

Rule = Callable[[LayerRecord], dict[str, JacobianBlock]]

_rules: dict[type[nn.Module], Rule] = {}


def register_rule(layer: type[nn.Module], *, overwrite: bool = False) -> Callable[[Rule], Rule]:
    """Registers a closed-form rule for a layer class and for the subclasses that keep its forward.

    The decorated function gets a :class:`LayerRecord` and returns, for each of the layer's direct
    parameters that requires a gradient, a block of b * k rows (sample-major) whose columns are the
    parameter's elements in order.

    Args:
        layer: The class of layers that the rule serves.
        overwrite: Whether to replace a rule that is already registered for this very class.

    Raises:
        ValueError: A rule is already registered and ``overwrite`` is False.
    """

    def decorate(rule: Rule) -> Rule:
        if layer in _rules and not overwrite:
            raise ValueError(
                f"Found a rule for {layer.__name__} already registered; expected none. Pass "
                "overwrite=True to replace it."
            )
        _rules[layer] = rule
        return rule

    return decorate


def find_rule(module: nn.Module) -> Rule | None:
    """The rule that serves ``module``, or None: then the generic fallback has to."""
    for layer in type(module).__mro__:
        rule = _rules.get(layer)
        if rule is None:
            continue
        return rule if _computes_as(module, layer) else None
    return None


def _computes_as(module: nn.Module, layer: type[nn.Module]) -> bool:
    """Whether ``module`` still computes what ``layer`` does, from its own plain parameters."""
    if type(module).forward is not layer.forward or "forward" in module.__dict__:
        return False
    if is_parametrized(module):
        return False
    # An old-style weight norm computes the weight in a hook: forward then reads a plain tensor.
    return not any(isinstance(module.__dict__.get(name), Tensor) for name in layer.__annotations__)
