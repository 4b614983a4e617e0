"""Checks of arguments that the functions of autojac share. All raise ValueError."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.overrides import is_tensor_like


def as_tensors(tensors: Sequence[Tensor] | Tensor, name: str) -> list[Tensor]:
    """One tensor or a sequence of different ones, not empty, as a list."""
    listed: list[Tensor] = [tensors] if is_tensor_like(tensors) else list(tensors)  # type: ignore[list-item]
    if not listed:
        raise ValueError(f"Found no `{name}`; expected at least one tensor.")
    if len(set(listed)) != len(listed):
        raise ValueError(f"Found a tensor more than once among `{name}`; expected each once.")
    return listed


def check_requires_grad(tensors: Sequence[Tensor], name: str) -> None:
    """Every tensor can be differentiated towards."""
    for i, tensor in enumerate(tensors):
        if not tensor.requires_grad:
            raise ValueError(
                f"Found `{name}[{i}]` of shape {list(tensor.shape)} with requires_grad=False; "
                "expected tensors that require a gradient. Set it before the forward pass."
            )


def check_shapes(
    given: Sequence[Tensor], like: Sequence[Tensor], name: str, like_name: str, leading: int
) -> None:
    """Each of ``given`` has the shape of its counterpart, behind ``leading`` more dimensions."""
    if len(given) != len(like):
        raise ValueError(
            f"Found {len(given)} `{name}` for {len(like)} `{like_name}`; expected as many."
        )
    for i, (tensor, counterpart) in enumerate(zip(given, like, strict=True)):
        if tensor.ndim < leading or tensor.shape[leading:] != counterpart.shape:
            expected = f"[m, *{list(counterpart.shape)}]" if leading else list(counterpart.shape)
            raise ValueError(
                f"Found `{name}[{i}]` of shape {list(tensor.shape)}; expected {expected}, to match "
                f"`{like_name}[{i}]`."
            )


def check_same_rows(jacs: Sequence[Tensor], name: str) -> None:
    """All Jacobians have the same number of rows."""
    counts = [len(jac) for jac in jacs]
    if len(set(counts)) > 1:
        raise ValueError(
            f"Found {sorted(set(counts))} rows among `{name}`; expected the same number of rows "
            "(objectives) everywhere."
        )


def as_cotangents(
    outputs: Sequence[Tensor], given: Sequence[Tensor] | Tensor | None, name: str, like_name: str
) -> list[Tensor] | None:
    """Initial Jacobians [m, *output.shape], one for each output; None stands for the identity."""
    if given is None:
        return None
    listed: list[Tensor] = [given] if is_tensor_like(given) else list(given)  # type: ignore[list-item]
    check_shapes(listed, outputs, name, like_name, leading=1)
    check_same_rows(listed, name)
    return listed
