"""What a run consists of: taken as nested state, and given back in place."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

from ._structure import join, split, targets


class RunState:
    """The parts of a run that have a state.

    Args:
        model: The model, wrapped or not.
        optimizers: Its optimizers.
        others: What else has a ``state_dict``, and generators, by name.
    """

    def __init__(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], others: dict[str, Any]
    ) -> None:
        self._model, self._optimizers, self._others = model, optimizers, others

    def capture(self) -> tuple[list[Any], dict[str, Tensor]]:
        """The structure of all parts, and their tensors, which still change with the run."""
        return split(self._parts(), "run")

    def targets(self, structure: list[Any]) -> dict[str, Tensor]:
        """The tensors to read a checkpoint into.

        Raises:
            ValueError: It is one of another model, or lacks a part.
        """
        live, tensors = split(self._parts(), "run")
        saved_parts, parts = _parts_of(structure), _parts_of(live)
        missing = sorted(parts.keys() - saved_parts.keys())
        if missing:
            raise ValueError(
                f"Found a checkpoint without {', '.join(missing)}; expected one of "
                f"{', '.join(parts)}. Leave out what it does not have."
            )
        found: dict[str, Tensor] = {}
        for name in parts:
            own = f"run/{name}"
            mine = {k: t for k, t in tensors.items() if k == own or k.startswith(f"{own}/")}
            found |= targets(saved_parts[name], mine, self._allocate, strict=name == "model")
        for name, optimizer in zip(self._names()[1:], self._optimizers, strict=False):
            groups = join(saved_parts[name], found)["param_groups"]
            then, now = ([len(g["params"]) for g in gs] for gs in (groups, optimizer.param_groups))
            if then != now:
                raise ValueError(
                    f"Found groups of {then} parameters for {name} in the checkpoint; expected "
                    f"{now}. Give the optimizer the groups that it had."
                )
        return found

    def apply(self, structure: list[Any], tensors: dict[str, Tensor]) -> None:
        """Gives the parts what was read into the tensors of ``targets``."""
        saved = _parts_of(structure)
        state = {name: join(saved[name], tensors) for name in self._names()}
        # The tensors are the model's own: what is left to give it is extra state.
        model_state = OrderedDict(state["model"])
        versions = getattr(get_model_state_dict(self._model), "_metadata", None)
        if versions is not None:
            model_state._metadata = versions  # type: ignore[attr-defined]
        set_model_state_dict(self._model, model_state)
        for i, optimizer in enumerate(self._optimizers):
            optimizer.load_state_dict(state[f"optimizer {i}"])
        for name, other in self._others.items():
            if isinstance(other, torch.Generator):
                other.set_state(state[name])
            else:
                other.load_state_dict(state[name])

    def _names(self) -> list[str]:
        optimizers = [f"optimizer {i}" for i in range(len(self._optimizers))]
        return ["model", *optimizers, *self._others]

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": dict(get_model_state_dict(self._model))}
        for i, optimizer in enumerate(self._optimizers):
            parts[f"optimizer {i}"] = optimizer.state_dict()
        for name, other in self._others.items():
            generator = isinstance(other, torch.Generator)
            parts[name] = other.get_state() if generator else other.state_dict()
        return parts

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for what a new optimizer or weighting does not have yet.

        State of an optimizer of the shape of its parameter is sharded like it.
        """
        parts = name.split("/")
        if parts[1].startswith("optimizer ") and parts[2] == "state":
            optimizer = self._optimizers[int(parts[1].removeprefix("optimizer "))]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            index = int(parts[3])
            if index < len(parameters):
                parameter = parameters[index]
                if isinstance(parameter, DTensor) and tuple(parameter.shape) == shape:
                    return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype)


def _parts_of(structure: list[Any]) -> dict[str, list[Any]]:
    return dict(structure[1])
