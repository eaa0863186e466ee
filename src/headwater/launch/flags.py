"""A command-line flag as annotation of a struct's field: help text, range, and the check of a value."""

import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec


@dataclass(frozen=True, slots=True)
class Flag:
    """Help text and bounds (inclusive) of one field of a struct."""

    help: str
    section: str
    low: float | None = None
    high: float | None = None
    also: tuple[str, ...] = ()  # aliases
    env: str | None = None  # an environment variable that sets it
    is_secret: bool = False  # never shown in /server_info or in logs


@dataclass(frozen=True, slots=True)
class FlagSpec:
    """A field's flag together with its type and default."""

    name: str
    flag: Flag
    type: Any  # str, int, float, bool or a Literal
    is_optional: bool
    default: Any

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def check(self, value: Any) -> None:
        """Raise `ValueError` unless `value` has the field's type and lies in its range."""
        if value is None and self.is_optional:
            return
        try:
            value = msgspec.convert(value, self.type)
        except msgspec.ValidationError:
            raise ValueError(f"{flag_name(self.name)} must be {self._expected()}, got {value!r}") from None
        low, high = self.flag.low, self.flag.high
        # in this form, NaN is rejected: all of its comparisons are false
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            raise ValueError(f"{flag_name(self.name)} must be {self._expected()}, got {value!r}")

    def _expected(self) -> str:
        if self.choices:
            return "one of " + ", ".join(self.choices)
        kind = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[self.type]
        low, high = self.flag.low, self.flag.high
        if low is not None and low == high:
            return f"{low}"
        if low is not None and high is not None:
            return f"{kind} from {low} to {high}"
        return f"{kind} of at least {low}" if low is not None else kind


def flag_name(field: str) -> str:
    """`page_size` → `--page-size`."""
    return "--" + field.replace("_", "-")


def read_flags(struct: type) -> dict[str, FlagSpec]:
    """The flags of a struct whose fields are `Annotated[type, Flag(...)]`, by field name, in the struct's order."""
    hints = get_type_hints(struct, include_extras=True)
    specs = {}
    for field in msgspec.structs.fields(struct):
        annotated, flag = get_args(hints[field.name])
        kind, is_optional = without_none(annotated)
        specs[field.name] = FlagSpec(field.name, flag, kind, is_optional, field.default)
    return specs


def without_none(annotated: Any) -> tuple[Any, bool]:
    """The type of a field that may be None, and whether it may."""
    if get_origin(annotated) not in (types.UnionType, Union):  # `Literal[...] | None` is a `Union`
        return annotated, False
    (kind,) = [part for part in get_args(annotated) if part is not types.NoneType]
    return kind, True
