"""Differences of JSON objects as merge patches (RFC 7386). No value is null: in a patch, null removes a member."""

from typing import Any

Json = dict[str, Any]


def difference(old: Json, new: Json) -> Json:
    """The patch that makes `new` of `old`; empty if they are equal. Lists are replaced whole."""
    patch: Json = dict.fromkeys(old.keys() - new.keys())
    for name, value in new.items():
        before = old.get(name)
        if before is value:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := difference(before, value):
                patch[name] = inner
        elif before != value or type(before) is not type(value):
            patch[name] = value
    return patch


def patched(old: Json, patch: Json) -> Json:
    """`old` after `patch`. Neither is changed."""
    new = dict(old)
    for name, value in patch.items():
        if value is None:
            new.pop(name, None)
        elif isinstance(value, dict):
            before = new.get(name)
            new[name] = patched(before if isinstance(before, dict) else {}, value)
        else:
            new[name] = value
    return new
