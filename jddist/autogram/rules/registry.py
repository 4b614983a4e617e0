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

# None: the rule does not serve this call, and the generic fallback has to.
Rule = Callable[[LayerRecord], dict[str, JacobianBlock] | None]

_rules: dict[type[nn.Module], Rule] = {}
_rules_by_name: dict[str, Rule] = {}
# What a subclass may do differently without computing anything else.
_HARMLESS = {"__init__", "__setstate__", "__repr__", "extra_repr", "reset_parameters"}


_replaying: set[Rule] = set()


def register_rule(
    layer: type[nn.Module], *, overwrite: bool = False, replays: bool = False
) -> Callable[[Rule], Rule]:
    """Registers a closed-form rule for a layer class and for the subclasses that keep its forward.

    The decorated function gets a :class:`LayerRecord` and returns, for each of the layer's direct
    parameters that requires a gradient, a block of b * k rows (sample-major) whose columns are the
    parameter's elements in order. It may return None for a call that it does not serve; the layer
    must then not draw random numbers.

    Args:
        layer: The class of layers that the rule serves.
        overwrite: Whether to replace a rule that is already registered for this very class.
        replays: Whether the rule repeats random numbers of the call: they are then recorded.

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
        if replays:
            _replaying.add(rule)
        return rule

    return decorate


def register_rule_by_name(name: str) -> Callable[[Rule], Rule]:
    """Registers a rule for a layer class of a library that is not imported for it.

    Args:
        name: The module and the name of the class, as in ``"library.module.Layer"``.
    """

    def decorate(rule: Rule) -> Rule:
        _rules_by_name[name] = rule
        return rule

    return decorate


def replays(rule: Rule | None, batched: bool) -> bool:
    """Whether a rule (or for None the fallback, in an engine with a batch dimension) repeats the
    random numbers of a call."""
    return batched if rule is None else rule in _replaying


def find_rule(module: nn.Module) -> Rule | None:
    """The rule that serves ``module``, or None: then the generic fallback has to."""
    for layer in type(module).__mro__:
        rule = _rules.get(layer)
        if rule is None and _rules_by_name:
            rule = _rules_by_name.get(f"{layer.__module__}.{layer.__qualname__}")
        if rule is None:
            continue
        return rule if _computes_as(module, layer) else None
    return None


def _computes_as(module: nn.Module, layer: type[nn.Module]) -> bool:
    """Whether ``module`` still computes what ``layer`` does, from its own plain parameters."""
    if "forward" in module.__dict__ or not _has_methods_of(type(module), layer):
        return False
    if is_parametrized(module):
        return False
    # An old-style weight norm computes the weight in a hook: forward then reads a plain tensor.
    # (The layer's bases have annotations too: those of Conv2d leave out the weight.)
    names = {name for base in layer.__mro__ for name in vars(base).get("__annotations__", ())}
    return not any(isinstance(module.__dict__.get(name), Tensor) for name in names | {"weight"})


def _has_methods_of(subclass: type, layer: type[nn.Module]) -> bool:
    """Whether ``subclass`` overrides nothing that ``layer`` computes with."""
    own = [c for c in layer.__mro__ if issubclass(c, nn.Module) and c is not nn.Module]
    names = {name for c in own for name, value in vars(c).items() if callable(value)}
    return all(getattr(subclass, n) is getattr(layer, n) for n in names - _HARMLESS)
