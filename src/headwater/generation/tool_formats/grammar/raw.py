"""Grammar of arguments that are written one by one: strings as raw text, all other values as JSON."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwater.generation.tool_formats.grammar.text import json_value, literal
from headwater.generation.tool_formats.reading.arguments import json_of, resolved, types_of_schema
from headwater.generation.tool_formats.tool_format import Tool
from headwater.grammars.errors import GrammarError

Around = Callable[[str, str, str], str]  # name, grammar of the value with its end, type: to the whole argument
Schema = Mapping[str, Any]
_TYPES = {"array", "boolean", "null", "number", "object", "string"}
_NAME = re.compile(r'[^"<>\s](?:[^"<>\n]*[^"<>\s])?')  # of a parameter
_DATE = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"  # a day that every month has
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "email": r"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@[A-Za-z0-9]+(-[A-Za-z0-9]+)*(\.[A-Za-z0-9]+(-[A-Za-z0-9]+)*)+",
    "uri": r"[a-z]{2,9}:\/\/[A-Za-z0-9.-]+(:[0-9]{1,5})?(\/[A-Za-z0-9._~!$&'()*+,;=:@\/?-]*)?",
}


@dataclass(frozen=True, slots=True)
class RawText:
    """How raw text ends: `end` as text, or as the special token `end_token`. It may hold none of `without`."""

    end: str
    without: Sequence[str] = ()
    end_token: str | None = None


def raw_calls(
    rule: str, tools: Sequence[Tool], *, call: Callable[[str, str], str], around: Around, text: RawText
) -> dict[str, str]:
    """The rules `rule`_0, `rule`_1, ... of calls, one for each tool, and those of their arguments.

    `call` makes an expression of a tool's name and the expression of its arguments. Raises as `raw_arguments`.
    """
    named: dict[str, str] = {}
    for i, tool in enumerate(tools):
        arguments, of_arguments = raw_arguments(tool, f"of_{i}", around=around, text=text)
        named[f"{rule}_{i}"] = call(tool.name, arguments)
        named |= of_arguments
    return named


def raw_arguments(tool: Tool, prefix: str, *, around: Around, text: RawText) -> tuple[str, dict[str, str]]:
    """A Lark expression for all arguments of a call in the schema's order, and the rules that it needs.

    The rules' names begin with `prefix`. Raises GrammarError for a schema that cannot be written so.
    """
    properties, required = parameters_of(tool)
    root = tool.parameters
    named: dict[str, str] = {}
    arguments: list[str] = []
    for i, (name, schema) in enumerate(properties.items()):
        path = path_of(name)
        if not _NAME.fullmatch(name):
            raise GrammarError(path, "", "the name of this parameter cannot be written in this format")
        rule = f"{prefix}_{i}"
        value, kind = _value(followed(schema, root), f"{rule}_value", _Place(root, path, text, named))
        named[rule] = around(name, value, kind)
        arguments.append(rule if required[i] else f"{rule}?")
    return " ".join(arguments), named


def parameters_of(tool: Tool) -> tuple[Mapping[str, Any], list[bool]]:
    """Schema of each parameter, and whether it is required. GrammarError if the schema says more than that."""
    schema = followed(tool.parameters, tool.parameters)
    check_keywords(schema, {"type", "properties", "required", "additionalProperties"}, "#")
    properties, required = schema.get("properties") or {}, schema.get("required") or ()
    return properties, [name in required for name in properties]


def path_of(name: str) -> str:
    """Where a parameter's schema stands."""
    return "#/properties/" + name.replace("~", "~0").replace("/", "~1")


def check_keywords(schema: Schema, known: set[str], path: str) -> None:
    """GrammarError for a keyword that these formats cannot enforce beside the known ones."""
    for keyword in sorted(set(schema) - known - {"$defs"}):
        raise GrammarError(path, keyword, "cannot be enforced here in this format of tool calls")


def followed(schema: Any, root: Schema) -> Schema:
    """What a reference alone refers to."""
    for _ in range(8):
        if not isinstance(schema, Mapping) or set(schema) - {"$defs"} != {"$ref"}:
            break
        schema = resolved(schema["$ref"], root)
    return schema if isinstance(schema, Mapping) else {}


@dataclass(frozen=True, slots=True)
class _Place:
    """What the grammar of a value is made with. New rules go to `named`."""

    root: Schema
    path: str
    text: RawText
    named: dict[str, str]


def _value(schema: Schema, rule: str, place: _Place) -> tuple[str, str]:
    """Grammar of a value with its end, and its type."""
    types = types_of_schema(schema, place.root)
    kind = "string" if types == {"string"} else "json"
    end = place.text.end_token or literal(place.text.end)
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if choices is not None:
        check_keywords(schema, {"type", "enum", "const"}, place.path)
        return f"({' | '.join(map(literal, _written(choices, types, place)))}) {end}", kind
    if types == {"string"}:
        return raw_text(schema, rule, place.text, place.named, path=place.path), kind
    if types and "string" in types and _is_any_text(schema, types):
        return raw_text({}, rule, place.text, place.named, path=place.path), kind
    if types is None or "string" in types:  # raw text would be read as what it looks like
        schema = {"allOf": [schema, {"type": sorted((types or _TYPES) - {"string"})}]}
    place.named[rule] = json_value(with_definitions(schema, place.root))
    return f"{rule} {end}", "json"


def with_definitions(schema: Schema, root: Schema) -> Schema:
    """The schema with what its references may lead to."""
    return {**schema, "$defs": root["$defs"]} if "$defs" in root else schema


def _written(choices: Sequence[Any], types: set[str] | None, place: _Place) -> list[str]:
    """The values of an enum as they are written, those left out that would be read as another value."""
    written: list[str] = []
    for choice in choices:
        raw = choice if isinstance(choice, str) else json.dumps(choice, ensure_ascii=False)
        is_read_so = types == {"string"} or json.loads(json_of(raw, types)) == choice
        if is_read_so and not any(part in raw for part in (place.text.end, *place.text.without)):
            written.append(raw)
    if not written:
        raise GrammarError(place.path, "enum", "has no value that this format of tool calls can write")
    return written


def _is_any_text(schema: Schema, types: set[str]) -> bool:
    """Is text of every kind valid, whatever it is read as?"""
    if types & {"object", "array"} or set(schema) - {"type", "anyOf"}:
        return False
    return all(isinstance(option, Mapping) and set(option) == {"type"} for option in schema.get("anyOf", ()))


def raw_text(schema: Schema, rule: str, text: RawText, named: dict[str, str], *, path: str) -> str:
    """Raw text that a schema of strings describes, and its end."""
    check_keywords(schema, {"type", "minLength", "maxLength", "pattern", "format"}, path)
    terminal = rule.upper()
    shortest, longest = schema.get("minLength", 0), schema.get("maxLength", "")
    allowed = [f"/(?s:.){{{shortest},{longest}}}/" if shortest or longest != "" else "/(?s:.*)/"]
    if "pattern" in schema:
        allowed.append(f"/{_regex(schema['pattern'], path)}/")
    if "format" in schema:
        if schema["format"] not in _FORMATS:
            raise GrammarError(path, "format", f"{schema['format']!r} cannot be enforced in this format of tool calls")
        allowed.append(f"/{_FORMATS[schema['format']]}/")
    parts = "|".join(map(_quoted, (text.end, *text.without)))
    allowed.append(f"~/(?s:.*)({parts})(?s:.*)/")  # one expression: the lexer's states would multiply
    named[terminal] = " & ".join(allowed)
    if text.end_token:
        named[rule] = terminal
        return f"{rule} {text.end_token}"
    named[f"{rule}[suffix={literal(text.end)}]"] = terminal
    return rule


def _regex(pattern: str, path: str) -> str:
    """A JSON schema's pattern, which may match anywhere, as one of the whole text."""
    inner = pattern.removeprefix("^")
    has_end = inner.endswith("$") and not inner.endswith("\\$")
    inner = inner[:-1] if has_end else inner
    if "|" in inner and inner != pattern and not re.fullmatch(r"\((?:[^()\\]|\\.)*\)", inner):
        raise GrammarError(path, "pattern", "cannot be enforced in this format of tool calls: put (...) around a|b")
    before = "" if pattern.startswith("^") else "(?s:.*)"
    inner = re.sub(r"(?<!\\)/", r"\\/", inner).replace("\n", "\\n")
    return f"{before}({inner}){'' if has_end else '(?s:.*)'}"


def _quoted(text: str) -> str:
    """Text as a part of a regular expression between slashes."""
    return re.escape(text).replace("/", "\\/").replace("\\\n", "\\n")
