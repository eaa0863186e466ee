"""Typed values of a model's files, each checked for its type and range."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from headwater.models.model_files import ModelFileError

_MOST = 1 << 53
_MOST_NUMBER = 1e300


class Fields:
    """The members of one parsed object. An absent member is the default; a wrong one raises ModelFileError.

    `source` names the file in errors. A member without a default must be present.
    """

    def __init__(self, values: Mapping[str, Any], *, source: str) -> None:
        self._values = values
        self.source = source

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def raw(self, key: str) -> Any:
        """The value as it is; None if absent."""
        return self._values.get(key)

    def refuse(self, reason: str) -> ModelFileError:
        return ModelFileError(self.source, reason)

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = _MOST) -> int:
        value = self._value(key, default, kind="integer")
        if isinstance(value, float) and value.is_integer():  # 2.0, of a writer with one kind of number
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.refuse(f"{key} must be an integer from {low} to {high}, found {_short(value)}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = -math.inf) -> float:
        value = self._value(key, default, kind="number")
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= _MOST_NUMBER:
            at_least = "finite" if low == -math.inf else f"at least {low:g}"
            raise self.refuse(f"{key} must be a number, {at_least}, found {_short(value)}")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._value(key, default, kind="truth value")
        if not isinstance(value, bool):
            raise self.refuse(f"{key} must be true or false, found {_short(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default, kind="string")
        if not isinstance(value, str):
            raise self.refuse(f"{key} must be a string, found {_short(value)}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty if absent."""
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.refuse(f"{key} must be a list of strings, found {_short(value)}")
        return value

    def integers(self, key: str, *, low: int = 0, high: int = _MOST) -> list[int]:
        """A list of integers; empty if absent."""
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(
            isinstance(each, int) and not isinstance(each, bool) and low <= each <= high for each in value
        ):
            raise self.refuse(f"{key} must be a list of integers from {low} to {high}, found {_short(value)}")
        return value

    def numbers(self, key: str, *, low: float = -math.inf) -> tuple[float, ...]:
        """A list of numbers, which must be there."""
        value = self._value(key, None, kind="list of numbers")
        if not isinstance(value, list):
            raise self.refuse(f"{key} must be a list of numbers, found {_short(value)}")
        each = Fields({f"{key}[{index}]": number for index, number in enumerate(value)}, source=self.source)
        return tuple(each.number(name, low=low) for name in each)

    def inner(self, key: str) -> "Fields":
        """The object under `key`; an empty one if absent."""
        value = self._values.get(key, {})
        if not isinstance(value, Mapping):
            raise self.refuse(f"{key} must be an object, found {_short(value)}")
        return Fields(value, source=self.source)

    def _value(self, key: str, default: Any, *, kind: str) -> Any:
        value = self._values.get(key, default)
        if value is None:
            raise self.refuse(f"lacks the {kind} {key!r}")
        return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
