"""Grammar of arguments that are written one by one: strings as raw text, all other values as JSON."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwater.generation.tool_formats.grammar.text import json_value, literal
from headwater.generation.tool_formats.reading.arguments import json_of, resolved, types_of_schema
from headwater.generation.tool_formats.tool_format import Tool

Around = Callable[[str, str, str], str]  # name, grammar of the value with its end, type: to the whole argument
Schema = Mapping[str, Any]
_PLAIN = {"type", "description", "title", "default", "examples"}  # keywords that limit nothing beside the type
_NAME = re.compile(r'[^"<>\s](?:[^"<>\n]*[^"<>\s])?')  # of a parameter
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True, slots=True)
class RawText:
    """How raw text ends: `end` as text, or as the special token `end_token`. It may hold none of `without`."""

    end: str
    without: Sequence[str] = ()
    end_token: str | None = None


def raw_arguments(tool: Tool, prefix: str, *, around: Around, text: RawText) -> tuple[str, dict[str, str]]:
    """A Lark expression for all arguments of a call in the schema's order, and the rules that it needs.

    The rules' names begin with `prefix`. Raises ValueError for a schema that cannot be written so.
    """
    properties, required = parameters_of(tool)
    named: dict[str, str] = {}
    arguments: list[str] = []
    for i, (name, schema) in enumerate(properties.items()):
        if not _NAME.fullmatch(name):
            raise ValueError(f"tools: {tool.name}: {name!r} is no name of a parameter in this format")
        rule = f"{prefix}_{i}"
        value, kind = _value(followed(schema, tool.parameters), tool.parameters, f"{rule}_value", text, named)
        named[rule] = around(name, value, kind)
        arguments.append(rule if required[i] else f"{rule}?")
    return " ".join(arguments), named


def parameters_of(tool: Tool) -> tuple[Mapping[str, Any], list[bool]]:
    """Schema of each parameter, and whether it is required. Raises ValueError if the schema says more than that."""
    composed = {"anyOf", "oneOf", "allOf", "not", "$ref", "dependentRequired", "if"} & set(tool.parameters)
    if composed:
        raise ValueError(f"tools: {tool.name}: {min(composed)} on all parameters cannot be enforced in this format")
    required = set(tool.parameters.get("required") or ())
    properties = dict(tool.properties) | {name: {} for name in sorted(required - set(tool.properties))}
    return properties, [name in required for name in properties]


def followed(schema: Any, root: Schema) -> Schema:
    """What a reference alone refers to."""
    for _ in range(8):
        if not isinstance(schema, Mapping) or set(schema) - _PLAIN != {"$ref"}:
            break
        schema = resolved(schema["$ref"], root)
    return schema if isinstance(schema, Mapping) else {}


def _value(schema: Schema, root: Schema, rule: str, text: RawText, named: dict[str, str]) -> tuple[str, str]:
    """Grammar of a value with its end, and its type. New rules go to `named`."""
    types = types_of_schema(schema, root)
    kind = "string" if types == {"string"} else "json"
    end = text.end_token or literal(text.end)
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if choices is not None:
        written = _written(choices, types, text)
        return f"({' | '.join(map(literal, written))}) {end}", kind
    if types == {"string"} or (types and "string" in types and _is_any_text(schema, types)):
        return raw_text(schema, rule, text, named), kind
    if types is None or "string" in types:  # raw text would be read as what it looks like
        schema = {"allOf": [schema, {"type": sorted((types or _TYPES) - {"string"})}]}
    named[rule] = json_value(with_definitions(schema, root))
    return f"{rule} {end}", "json"


def with_definitions(schema: Schema, root: Schema) -> Schema:
    """The schema with what its references may lead to."""
    return {**schema, **{key: root[key] for key in _DEFINITIONS if key in root}}


_TYPES = {"array", "boolean", "null", "number", "object", "string"}


def _written(choices: Sequence[Any], types: set[str] | None, text: RawText) -> list[str]:
    """The values of an enum as they are written, those left out that would be read as another value."""
    written: list[str] = []
    for choice in choices:
        raw = choice if isinstance(choice, str) else json.dumps(choice, ensure_ascii=False)
        is_read_so = types == {"string"} or json.loads(json_of(raw, types)) == choice
        if is_read_so and not any(part in raw for part in (text.end, *text.without)):
            written.append(raw)
    if not written:
        raise ValueError("tools: an enum has no value that can be written in this format")
    return written


def _is_any_text(schema: Schema, types: set[str]) -> bool:
    """Is text of every kind valid, whatever it is read as?"""
    options = [option for key in ("anyOf", "oneOf") for option in schema.get(key, ())] or [schema]
    return all(
        isinstance(option, Mapping) and not set(option) - _PLAIN - {"anyOf", "oneOf"} for option in options
    ) and not types & {"object", "array"}


def raw_text(schema: Schema, rule: str, text: RawText, named: dict[str, str]) -> str:
    """Raw text and its end."""
    terminal = rule.upper()
    shortest, longest = schema.get("minLength", 0), schema.get("maxLength", "")
    allowed = [f"/(?s:.){{{shortest},{longest}}}/" if shortest or longest != "" else "/(?s:.*)/"]
    if "pattern" in schema:
        allowed.append(f"/{_regex(schema['pattern'])}/")
    parts = "|".join(map(_quoted, (text.end, *text.without)))
    allowed.append(f"~/(?s:.*)({parts})(?s:.*)/")  # one expression: the lexer's states would multiply
    named[terminal] = " & ".join(allowed)
    if text.end_token:
        named[rule] = terminal
        return f"{rule} {text.end_token}"
    named[f"{rule}[suffix={literal(text.end)}]"] = terminal
    return rule


def _regex(pattern: str) -> str:
    """A JSON schema's pattern, which may match anywhere, as one of the whole text."""
    inner = pattern.removeprefix("^")
    has_end = inner.endswith("$") and not inner.endswith("\\$")
    inner = inner[:-1] if has_end else inner
    if "|" in inner and inner != pattern and not re.fullmatch(r"\((?:[^()\\]|\\.)*\)", inner):
        raise ValueError(f"tools: the pattern {pattern} cannot be enforced in this format")
    before = "" if pattern.startswith("^") else "(?s:.*)"
    inner = re.sub(r"(?<!\\)/", r"\\/", inner).replace("\n", "\\n")
    return f"{before}({inner}){'' if has_end else '(?s:.*)'}"


def _quoted(text: str) -> str:
    """Text as a part of a regular expression between slashes."""
    return re.escape(text).replace("/", "\\/").replace("\\\n", "\\n")
