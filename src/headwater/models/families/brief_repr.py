"""The `repr` of a config that has grown: what it was before, where the new fields say nothing."""

from dataclasses import fields
from typing import Any


def brief_repr(config: Any, *, last: str) -> str:
    """The `repr` of a dataclass, without fields behind `last` that have their default value."""
    shown, is_old = [], True
    for each in fields(config):
        value = getattr(config, each.name)
        if each.repr and (is_old or value != each.default):
            shown.append(f"{each.name}={value!r}")
        is_old = is_old and each.name != last
    return f"{type(config).__name__}({', '.join(shown)})"
