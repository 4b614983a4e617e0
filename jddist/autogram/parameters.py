"""Which parameters an engine answers for, and which module's calls account for each of them.

Every trainable parameter in scope is listed once, in the modules' order. A parameter has an owner
for each module that holds it directly (tied weights have several). Some modules use parameters of
their children without calling them; those parameters are accounted for by the parent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.nn.utils.parametrize import is_parametrized

from .rules import Rule, find_rule


@dataclass(frozen=True, eq=False)
class Owner:
    """A module whose calls account for some parameters.

    Attributes:
        name: The module's name below the engine's root, for messages.
        module: The module whose calls are recorded.
        paths: Relative path below the module -> parameter.
        rule: The closed form, or None for the generic fallback.
    """

    name: str
    module: nn.Module
    paths: dict[str, Parameter]
    rule: Rule | None


@dataclass(eq=False)
class Entry:
    """One parameter with its name."""

    index: int
    name: str
    parameter: Parameter


@dataclass(eq=False)
class ParameterTable:
    """All parameters and owners in scope, in an order that is the same on every rank."""

    entries: list[Entry] = field(default_factory=list)
    owners: list[Owner] = field(default_factory=list)
    index_of: dict[Parameter, int] = field(default_factory=dict)
    owner_of: dict[nn.Module, Owner] = field(default_factory=dict)
    index_of_owner: dict[Owner, int] = field(default_factory=dict)

    def check_current(self, stand_ins: Mapping[Tensor, Parameter]) -> None:
        """Raises ValueError if a module holds other parameters than when the table was built.

        Args:
            stand_ins: What modules may hold in place of a parameter, with that parameter.
        """
        for owner in self.owners:
            direct = sum(p is not None for p in owner.module._parameters.values())
            same = direct == sum("." not in path for path in owner.paths)
            for path, parameter in owner.paths.items():
                parent, _, name = path.rpartition(".")
                holder = owner.module.get_submodule(parent)
                held = holder._parameters.get(name)
                same = same and (
                    held is parameter or (held is not None and stand_ins.get(held) is parameter)
                )
            if not same:
                raise ValueError(
                    f"Found other parameters in module '{owner.name}' than when the engine was "
                    "created; expected the same. Create a new Engine after loading with "
                    "assign=True, tying or parametrizing."
                )

    @property
    def trainable(self) -> list[Entry]:
        """The entries whose parameter requires a gradient now."""
        return [entry for entry in self.entries if entry.parameter.requires_grad]


def scope_of(modules: Iterable[nn.Module], recursive: bool) -> dict[nn.Module, str]:
    """The modules in scope with their names, parents first.

    Args:
        modules: The modules that the engine was given.
        recursive: Whether their descendants belong to the scope too.
    """
    given = list(modules)
    scope: dict[nn.Module, str] = {}
    if recursive:
        for i, root in enumerate(given):
            prefix = "" if len(given) == 1 else str(i)
            for name, module in root.named_modules(prefix=prefix):
                scope.setdefault(module, name)
        return scope
    names: dict[nn.Module, str] = {}
    for root in roots_of(given):
        for name, module in root.named_modules():
            names.setdefault(module, name)
    for module in given:
        scope.setdefault(module, names[module])
    return scope


def roots_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the modules that are no descendants of others among them."""
    given = list(dict.fromkeys(modules))
    below = {child for m in given for child in m.modules() if child is not m}
    return [m for m in given if m not in below]


def build_table(scope: dict[nn.Module, str]) -> ParameterTable:
    """Assigns every parameter in scope to the modules that account for it."""
    table = ParameterTable()
    covered: set[nn.Module] = set()
    for module, name in scope.items():
        if module in covered:
            continue
        paths = {path: p for path, p in module._parameters.items() if p is not None}
        for child_path, child in _children_read_directly(module):
            if child in scope:
                covered.add(child)
                for path, p in child._parameters.items():
                    if p is not None:
                        paths[f"{child_path}.{path}"] = p
        if not paths:
            continue
        owner = Owner(name, module, paths, find_rule(module))
        table.index_of_owner[owner] = len(table.owners)
        table.owners.append(owner)
        table.owner_of[module] = owner
        for path, parameter in paths.items():
            if parameter not in table.index_of:
                full_name = f"{name}.{path}" if name else path
                table.index_of[parameter] = len(table.entries)
                table.entries.append(Entry(len(table.entries), full_name, parameter))
    return table


def _children_read_directly(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Descendants whose parameters the module's own forward reads instead of calling them."""
    if isinstance(module, nn.MultiheadAttention):
        yield "out_proj", module.out_proj
    if is_parametrized(module):
        for name, child in module.named_modules():
            if name.startswith("parametrizations."):
                yield name, child
