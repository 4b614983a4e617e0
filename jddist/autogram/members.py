"""Which modules belong to an engine, and whether they are still what they were at construction."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from jddist.distribution.base import Distribution
from jddist.distribution.select import unwrap
from jddist.errors import UnsupportedModelError

from .parameters import ParameterTable, build_table, scope_of
from .refusals import check_modules


class Members:
    """The modules whose parameters count.

    Args:
        given: The modules that were given, in their wrappers.
        recursive: Whether their descendants count too.

    Attributes:
        scope: All modules in scope, with their names.
        table: Their parameters.

    Raises:
        ValueError: They have no trainable parameters.
        UnsupportedModelError: There are complex ones.
    """

    def __init__(self, given: list[nn.Module], recursive: bool) -> None:
        self._given = given
        bare = [unwrap(m) for m in given]
        self.scope: dict[nn.Module, str] = scope_of(bare, recursive)
        self._roots = bare if recursive else []
        self.table: ParameterTable = build_table(self.scope)
        if not self.table.trainable:
            raise ValueError(
                "Found no trainable parameters in the given modules; expected some. Pass the model "
                "itself, or model.modules(): of an iterable only direct parameters count."
            )
        # Frozen ones may yet be trained.
        complex_ones = [e.name for e in self.table.entries if e.parameter.is_complex()]
        if complex_ones:
            raise UnsupportedModelError(
                f"Found complex parameters: {', '.join(complex_ones)}; expected real ones, whose "
                "gradients' products make the Gramian. Keep real and imaginary parts in a real "
                "parameter, and use torch.view_as_complex in the forward."
            )

    @property
    def are_bare(self) -> bool:
        """Whether they were given without a wrapper."""
        return all(unwrap(m) is m for m in self._given)

    def check_reduced(self, distribution: Distribution) -> None:
        """Raises UnsupportedModelError if the wrapper's backward would not reduce a gradient."""
        if not distribution.reduces_others:
            self.check_no_others(distribution, "Call fully_shard on the whole model too.")

    def check_no_others(self, distribution: Distribution, fix: str) -> None:
        """Raises UnsupportedModelError if there are parameters that no wrapper reduces.

        Args:
            distribution: How the parameters are distributed.
            fix: What to do about it.
        """
        own = distribution.is_own
        bare = [e.name for e in self.table.trainable if not own(e.parameter)]
        if bare and distribution.group.size > 1:
            raise UnsupportedModelError(
                f"Found trainable parameters that are not sharded: {', '.join(bare)}; expected all "
                f"of them to be, since no backward reduces the others' gradients over ranks. {fix}"
            )

    def check_current(self, distribution: Distribution, *, batched: bool) -> None:
        """Raises ValueError or UnsupportedModelError if they have become unfit for a step.

        Args:
            distribution: How the parameters are distributed.
            batched: Whether the engine has a batch dimension.
        """
        self.table.check_current(distribution.stand_ins())
        new = [
            name
            for root in self._roots
            for name, module in root.named_modules()
            if module not in self.scope and any(True for _ in module.parameters(recurse=False))
        ]
        if new:
            raise ValueError(
                f"Found modules that joined the model after the engine was created: "
                f"{', '.join(new)}; expected none. Create a new Engine."
            )
        check_modules(self.scope, batched=batched, num_ranks=distribution.group.size)


def given_modules(
    modules: tuple[nn.Module | Iterable[nn.Module], ...],
) -> tuple[list[nn.Module], bool]:
    """The modules, and whether their descendants count too.

    Raises:
        UnsupportedModelError: Something among them is no module.
    """
    # A Sequential is an iterable as well as a module: ask for the module first.
    if len(modules) == 1 and not isinstance(modules[0], nn.Module):
        given, recursive = list(modules[0]), False
    else:
        given, recursive = list(modules), True  # type: ignore[arg-type]
    for module in given:
        if not isinstance(module, nn.Module):
            raise UnsupportedModelError(
                f"Found a {type(module).__name__} among the modules; expected nn.Modules, or one "
                "iterable of them. Pass the model, or model.modules()."
            )
    return given, recursive
