"""Arguments that are not written as JSON become JSON here, by the tool's schema."""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headwater.generation.tool_formats.reading.call_writer import CallWriter
from headwater.generation.tool_formats.reading.json_text import Emit, escaped, json_string, read_value
from headwater.generation.tool_formats.reading.reader import CutOff, NotACall, Parse, Reader
from headwater.generation.tool_formats.tool_format import Tool

Schema = Mapping[str, Any]
_MAX_DEPTH = 16  # of alternatives inside alternatives
IsEnd = Callable[[str], Parse[bool]]
_SPACE = re.compile(r"[ \t]+")
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


class ArgumentsWriter:
    """Writes the object of a call's arguments, one after the other. A name that comes twice counts once."""

    def __init__(self, writer: CallWriter, tool: Tool) -> None:
        self._writer = writer
        self._tool = tool
        self._names: set[str] = set()

    def begin(self, name: str) -> bool:
        """Write the name. False: it has come before, so its value must not be written."""
        if name in self._names:
            return False
        self._writer.arguments(f"{', ' if self._names else '{'}{json_string(name)}: ")
        self._names.add(name)
        return True

    def end(self, *, is_certain: bool = True) -> None:
        """Write the object's end, and the call's."""
        self._writer.arguments("}" if self._names else "{}")
        self._writer.end(is_certain=is_certain)

    def value(self, name: str, *, is_string: bool | None = None) -> "ArgumentValue":
        """A sink for the raw text of one value. `is_string`: as the format says, else as the schema says."""
        types = types_of(self._tool, name)
        if is_string is None:
            is_string = types == {"string"}
        elif not is_string:
            types = (types or set()) - {"string"} or None
        emit = self._writer.arguments if self.begin(name) else _ignore
        return ArgumentValue(emit, types, is_string=is_string)


class ArgumentValue:
    """The raw text of one value: written as it comes if it is a string, else when it is complete."""

    def __init__(self, emit: Emit, types: set[str] | None, *, is_string: bool) -> None:
        self._emit = emit
        self._types = types
        self._is_string = is_string
        self._held: list[str] = []
        if is_string:
            emit('"')

    @property
    def is_string(self) -> bool:
        return self._is_string

    def add(self, text: str) -> None:
        if self._is_string:
            self._emit(escaped(text))
        else:
            self._held.append(text)

    def end(self) -> None:
        self._emit('"' if self._is_string else json_of("".join(self._held), self._types))


def _ignore(text: str) -> None:
    del text


def read_raw(reader: Reader, value: ArgumentValue, ends: Sequence[str], is_end: IsEnd) -> Parse[None]:
    """Take a value's raw text up to the first of `ends` that `is_end` confirms, which is taken as well.

    Text that only looks like an end is part of the value, and so is an end inside JSON. Raises CutOff.
    """
    if not value.is_string and (yield from _read_json(reader, value, ends, is_end)):
        return
    while True:
        end = yield from reader.until(ends, value.add)
        if not end:
            raise CutOff
        position = reader.position
        if (yield from is_end(end)):
            value.end()
            return
        reader.position = position
        value.add(end)


def _read_json(reader: Reader, value: ArgumentValue, ends: Sequence[str], is_end: IsEnd) -> Parse[bool]:
    """Take the value and its end if it is JSON."""
    position = reader.position
    pieces: list[str] = []
    try:
        yield from read_value(reader, pieces.append)
        yield from reader.all_of(_SPACE)
        end = yield from reader.take(*ends)
        is_json = bool(end) and (yield from is_end(end))
    except (NotACall, CutOff):
        is_json = False
    if not is_json:
        reader.position = position
        return False
    value.add("".join(pieces))
    value.end()
    return True


def types_of(tool: Tool, name: str) -> set[str] | None:
    """The JSON types that a parameter may have; None: any."""
    schema = tool.properties.get(name)
    return types_of_schema(schema, tool.parameters) if isinstance(schema, Mapping) else {"string"}


def types_of_schema(schema: Any, root: Schema) -> set[str] | None:
    """The JSON types that a value may have; None: any. `root`: where references lead."""
    return _types(schema, root, {}, depth=_MAX_DEPTH)


def _types(schema: Any, root: Schema, known: dict[str, set[str] | None], *, depth: int) -> set[str] | None:
    """`known`: the types behind references that have been followed; those still being followed may have any.

    A schema that no one enforces may be none: what is malformed allows any type.
    """
    if not isinstance(schema, Mapping) or not depth:
        return None
    if "$ref" in schema:
        reference = str(schema["$ref"])
        if reference not in known:
            known[reference] = None
            known[reference] = _types(resolved(reference, root), root, known, depth=depth - 1)
        return known[reference]
    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return set(types) if all(isinstance(name, str) for name in types) else None
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return {_type_of(value) for value in values} if isinstance(values, list) else None
    for key in ("anyOf", "oneOf"):
        if key in schema:
            options = schema[key] if isinstance(schema[key], list) else [None]
            found = [_types(option, root, known, depth=depth - 1) for option in options]
            return None if None in found else set[str]().union(*(types or () for types in found))
    return {"object"} if "properties" in schema else {"array"} if "items" in schema else None


def resolved(reference: Any, root: Schema) -> Any:
    """The schema that a reference such as `#/$defs/x` leads to; None: there is none."""
    node: Any = root
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    for key in reference[2:].split("/"):
        node = node.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
    return node


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")


def json_of(text: str, types: set[str] | None) -> str:
    """The JSON text of a raw value that may have these types. Text that fits none of them is a string."""
    stripped = text.strip()
    for candidate in (stripped, _PYTHON_WORDS.get(stripped, ""), _json_of_python(stripped)):
        try:
            value = json.loads(candidate, parse_constant=_refuse)
        except (ValueError, RecursionError):
            continue
        if not isinstance(value, str) and _fits(value, types):
            return candidate
        if isinstance(value, str) and types is not None and "string" not in types:
            return json_of(value, types) if value != text else candidate  # JSON in JSON
    return json_string(text)


def _fits(value: Any, types: set[str] | None) -> bool:
    kind = _type_of(value)
    if types is None or kind in types or (kind == "integer" and "number" in types):
        return True
    return kind == "number" and "integer" in types and value.is_integer()


def _refuse(name: str) -> Any:
    raise ValueError(name)


def _json_of_python(text: str) -> str:
    if text[:1] not in ("{", "["):
        return ""
    try:
        return json.dumps(ast.literal_eval(text), allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return ""
