"""Whether two JSON schemas exclude each other: then `oneOf` says the same as `anyOf`, which a grammar can express."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Any  # a prepared schema: a dict, or True or False

_ANY = frozenset(("null", "boolean", "integer", "fraction", "string", "array", "object"))
_BY_TYPE = {name: frozenset((name,)) for name in _ANY} | {"number": frozenset(("integer", "fraction"))}
MAX_COMPARISONS = 20_000
_MAX_DEPTH = 6


class Disjointness:
    """Compares schemas of one document. `definitions` are the targets of its `$ref`s, by reference."""

    def __init__(self, definitions: Mapping[str, Schema]) -> None:
        self._definitions = definitions
        self._num_left = MAX_COMPARISONS

    def are(self, first: Schema, second: Schema, depth: int = 0) -> bool:
        """Whether no value matches both. False also means: not proved."""
        self._num_left -= 1
        if self._num_left < 0 or depth > _MAX_DEPTH:
            return False
        parts, others = list(self._parts(first)), list(self._parts(second))
        if any(self._directly(one, other, depth) for one in parts for other in others):
            return True
        return self._each_option(parts, second, depth) or self._each_option(others, first, depth)

    def _each_option(self, parts: list[Schema], other: Schema, depth: int) -> bool:
        for part in parts:
            if not isinstance(part, dict):
                continue
            for options in (part.get("anyOf"), part.get("oneOf")):
                if options and all(self.are(option, other, depth + 1) for option in options):
                    return True
        return False

    def _parts(self, schema: Schema, depth: int = 0) -> Iterator[Schema]:
        """Schemas that all hold at once: the schema itself, the target of its `$ref`, and `allOf`."""
        yield schema
        if not isinstance(schema, dict) or depth > _MAX_DEPTH:
            return
        for part in [*schema.get("allOf", ()), *([self._definitions[schema["$ref"]]] if "$ref" in schema else ())]:
            yield from self._parts(part, depth + 1)

    def _directly(self, first: Schema, second: Schema, depth: int) -> bool:
        if first is False or second is False:
            return True
        if first is True or second is True:
            return False
        types = _types(first) & _types(second)
        if not types:
            return True
        values, others = _values(first), _values(second)
        if values is not None and others is not None and not values & others:
            return True
        return types == {"object"} and self._by_property(first, second, depth)

    def _by_property(self, first: dict[str, Any], second: dict[str, Any], depth: int) -> bool:
        """Whether a property that one of two objects must have cannot be in the other."""
        for one, other in ((first, second), (second, first)):
            for name in one.get("required", ()):
                if _cannot_have(other, name):
                    return True
                of_one, of_other = (schema.get("properties", {}).get(name) for schema in (one, other))
                if of_one is not None and of_other is not None and self.are(of_one, of_other, depth + 1):
                    return True
        return False


def _cannot_have(schema: dict[str, Any], name: str) -> bool:
    is_closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    return is_closed and name not in schema.get("properties", {})


def _types(schema: dict[str, Any]) -> frozenset[str]:
    types = _ANY
    if (given := schema.get("type")) is not None:
        names = [given] if isinstance(given, str) else given
        types = frozenset[str]().union(*(_BY_TYPE[name] for name in names))
    if (values := _values(schema)) is not None:
        types &= {kind for kind, _ in values}
    return types


def _values(schema: dict[str, Any]) -> frozenset[tuple[str, str]] | None:
    """The only values that `const` and `enum` leave, as (type, JSON); None if there is no such list."""
    lists = [[schema["const"]]] if "const" in schema else []
    lists += [schema["enum"]] if "enum" in schema else []
    sets = [frozenset((_type_of(value), _json(value)) for value in values) for values in lists]
    return frozenset.intersection(*sets) if sets else None


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "fraction"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def _json(value: Any) -> str:
    """Equal for values that JSON Schema calls equal: 1 and 1.0 are, 1 and true are not."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
