"""Hyperparameters that are validated whenever they are set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

_T = TypeVar("_T")


class Checked(Generic[_T]):
    """An attribute that may be read and set, and refuses wrong values with a ValueError.

    `alpha = Checked[float](lambda value: value >= 0.0, "non-negative")` in the body of a class.

    Args:
        is_valid: Whether a value is acceptable.
        expected: What it must be, as in "alpha must be ...".
    """

    def __init__(self, is_valid: Callable[[_T], bool], expected: str) -> None:
        self._is_valid = is_valid
        self._expected = expected

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> _T: ...

    def __get__(self, instance: object | None, owner: type) -> Any:
        return self if instance is None else instance.__dict__[f"_{self._name}"]

    def __set__(self, instance: object, value: _T) -> None:
        if not self._is_valid(value):
            name = self._name
            raise ValueError(f"{name} must be {self._expected}. Found {name}={value!r}.")
        instance.__dict__[f"_{self._name}"] = value
