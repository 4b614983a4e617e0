"""Nested state with tensors in it, taken apart into its structure and its tensors.

The tensors go to ``torch.distributed.checkpoint``, which cuts and joins shards. The structure, with
all that is no tensor, goes to a file of its own, which holds nothing but plain Python values.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# A node of a structure is a list that starts with its kind.
_TENSOR, _DICT, _LIST, _TUPLE, _VALUE = "tensor", "dict", "list", "tuple", "value"


def split(value: Any, path: str) -> tuple[list[Any], dict[str, Tensor]]:
    """Takes nested dicts, lists and tuples apart.

    Args:
        value: The state.
        path: How the names of the tensors start.

    Returns:
        The structure, and the tensors by name.

    Raises:
        ValueError: The state holds something that only unpickling could restore.
    """
    tensors: dict[str, Tensor] = {}
    return _split(value, path, tensors), tensors


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> list[Any]:
    if isinstance(value, Tensor):
        name = path
        while name in tensors:  # keys 1 and "1", say
            name += "'"
        tensors[name] = value.detach()
        return [_TENSOR, name, list(value.shape), str(value.dtype)]
    if type(value) in (dict, OrderedDict):
        return [_DICT, [[k, _split(v, f"{path}/{k}", tensors)] for k, v in value.items()]]
    if type(value) in (list, tuple):
        kind = _LIST if isinstance(value, list) else _TUPLE
        return [kind, [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]]
    _check_is_plain(value, path)
    return [_VALUE, value]


def join(structure: list[Any], tensors: dict[str, Tensor]) -> Any:
    """The inverse of ``split``."""
    kind, *content = structure
    if kind == _TENSOR:
        return tensors[content[0]]
    if kind == _DICT:
        return {key: join(node, tensors) for key, node in content[0]}
    if kind in (_LIST, _TUPLE):
        nodes = [join(node, tensors) for node in content[0]]
        return nodes if kind == _LIST else tuple(nodes)
    return content[0]


def described(structure: list[Any]) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """The name, shape and dtype of each tensor of a structure."""
    kind, *content = structure
    if kind == _TENSOR:
        name, shape, dtype = content
        yield name, tuple(shape), getattr(torch, dtype.removeprefix("torch."))
    elif kind == _DICT:
        for _, node in content[0]:
            yield from described(node)
    elif kind in (_LIST, _TUPLE):
        for node in content[0]:
            yield from described(node)


def to_bytes(value: Any) -> bytes:
    """A value in the format of ``torch.save``."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def from_bytes(content: bytes) -> Any:
    """The value again; no code of the file is run."""
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def _check_is_plain(value: Any, path: str) -> None:
    """What could not be read back is refused now, not when it is needed."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        return
    try:
        from_bytes(to_bytes(value))
    except Exception as error:
        raise ValueError(
            f"Found a {type(value).__name__} at '{path}' of the state; expected tensors, numbers, "
            "strings, and dicts, lists and tuples of those, since a checkpoint is read without "
            "unpickling. Convert it in state_dict and load_state_dict."
        ) from error


Allocate = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


def targets(
    structure: list[Any],
    live: dict[str, Tensor],
    allocate: Allocate,
    *,
    strict: bool,
) -> dict[str, Tensor]:
    """The tensors into which those of a structure are to be read.

    Args:
        structure: That of the checkpoint.
        live: The tensors that are there now, by name.
        allocate: Makes one that is not there, or of another shape.
        strict: Whether all of them must be there, with their shapes and dtypes, and no others.

    Raises:
        ValueError: ``strict`` is violated; nothing was read then.
    """
    saved = {name: (shape, dtype) for name, shape, dtype in described(structure)}
    if strict:
        _check_same(saved, {n: (tuple(t.shape), t.dtype) for n, t in live.items()})
    found = {}
    for name, (shape, dtype) in saved.items():
        tensor = live.get(name)
        fits = tensor is not None and tuple(tensor.shape) == shape and tensor.dtype == dtype
        found[name] = tensor if tensor is not None and fits else allocate(name, shape, dtype)
    return found


_Kinds = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _check_same(saved: _Kinds, live: _Kinds) -> None:
    problems = [f"'{name}' is not in the checkpoint" for name in live.keys() - saved.keys()]
    problems += [f"'{name}' is only in the checkpoint" for name in saved.keys() - live.keys()]
    for name in saved.keys() & live.keys():
        if saved[name] != live[name]:
            then, now = (f"{dtype} {list(shape)}" for shape, dtype in (saved[name], live[name]))
            problems.append(f"'{name}' is {then} in the checkpoint and {now} now")
    if problems:
        problems.sort()
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" * (len(problems) > 5))
        raise ValueError(
            f"Found a checkpoint of something else: {listed}; expected the same names, shapes and "
            "dtypes. Build the model as it was when the checkpoint was written."
        )
