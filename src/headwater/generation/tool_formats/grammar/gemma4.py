"""Grammar of Gemma's calls: the values of a JSON schema with unquoted keys and raw strings between quote tokens."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from headwater.generation.tool_formats.grammar.raw import RawText, check_keywords, parameters_of, path_of, raw_text
from headwater.generation.tool_formats.grammar.text import (
    json_value,
    literal,
    marker,
    one_of,
    repeated,
    rules,
    separated,
)
from headwater.generation.tool_formats.reading.arguments import resolved
from headwater.generation.tool_formats.tool_format import Tool
from headwater.grammars.errors import GrammarError

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
Schema = Mapping[str, Any]
_KEY = re.compile(r"[\w$][\w $.-]*")
_SCALARS = ("string", "number", "boolean", "null")


def write_grammar(tools: Sequence[Tool], parallel: bool, special_tokens: Mapping[str, int]) -> str:
    quote = marker(QUOTE, special_tokens)
    named = {
        "start": repeated("call", "", parallel=parallel),
        "call": f'{marker(OPEN, special_tokens)} "call:" function {marker(CLOSE, special_tokens)}',
        "function": one_of("function", tools),
    }
    for i, tool in enumerate(tools):
        properties, required = parameters_of(tool)
        values = _Values(tool.parameters, f"of_{i}", named, quote=quote, has_token=QUOTE in special_tokens)
        named[f"function_{i}"] = f"{literal(tool.name)} {values.object(properties, required)}"
    return rules(named)


class _Values:
    """Writes the rules of one tool's values."""

    def __init__(self, root: Schema, prefix: str, named: dict[str, str], *, quote: str, has_token: bool) -> None:
        self._root = root
        self._prefix = prefix
        self._named = named
        self._quote = quote
        self._text = RawText(QUOTE, end_token=quote if has_token else None)
        self._num_rules = 0
        self._rule_of_reference: dict[str, str] = {}

    def object(self, properties: Schema, required: Sequence[bool], path: str = "#") -> str:
        names = [self._property(name, schema, path) for name, schema in properties.items()]
        inner, more = separated(names, required, '","', prefix=self._name())
        self._named |= more
        return f'"{{" {inner} "}}"'

    def _property(self, name: str, schema: Any, path: str) -> str:
        path = path + path_of(name).removeprefix("#")
        if not _KEY.fullmatch(name):
            raise GrammarError(path, "", "the name of this parameter cannot be written in this format")
        return self._rule(f"{literal(name + ':')} {self._value(schema, path)}")

    def _name(self) -> str:
        self._num_rules += 1
        return f"{self._prefix}_{self._num_rules}"

    def _rule(self, body: str) -> str:
        name = self._name()
        self._named[name] = body
        return name

    def _value(self, schema: Any, path: str) -> str:
        if not isinstance(schema, Mapping):
            schema = {}
        if "$ref" in schema:
            check_keywords(schema, {"$ref"}, path)
            return self._reference(str(schema["$ref"]))
        if "enum" in schema or "const" in schema:
            check_keywords(schema, {"type", "enum", "const"}, path)
            choices = schema.get("enum", [schema.get("const")])
            return f"({' | '.join(self._constant(choice, path) for choice in choices)})"
        if "anyOf" in schema:
            check_keywords(schema, {"anyOf"}, path)
            return f"({' | '.join(self._value(option, f'{path}/anyOf') for option in schema['anyOf'])})"
        types = schema.get("type", list(_SCALARS))
        types = types if isinstance(types, list) else [types]
        if len(types) > 1 or "type" not in schema:
            check_keywords(schema, {"type"}, path)
        return f"({' | '.join(self._typed(schema, kind, path) for kind in types)})"

    def _reference(self, reference: str) -> str:
        if reference not in self._rule_of_reference:
            self._rule_of_reference[reference] = name = self._name()
            self._named[name] = self._value(resolved(reference, self._root), reference)
        return self._rule_of_reference[reference]

    def _typed(self, schema: Schema, kind: str, path: str) -> str:
        if kind == "string":
            return f"{self._quote} {raw_text(schema, self._name(), self._text, self._named, path=path)}"
        if kind == "boolean":
            return '"true" | "false"'
        if kind == "null":
            return '"null"'
        if kind == "array":
            return self._array(schema, path)
        if kind == "object":
            return self._object_of(schema, path)
        return self._rule(json_value({**schema, "type": kind}))

    def _array(self, schema: Schema, path: str) -> str:
        check_keywords(schema, {"type", "items", "minItems", "maxItems"}, path)
        shortest, longest = schema.get("minItems", 0), schema.get("maxItems")
        if longest == 0:
            return '"[" "]"'
        item = self._rule(self._value(schema.get("items"), f"{path}/items"))
        more = "" if longest is None else longest - 1
        items = f'{item} ("," {item}){{{max(shortest - 1, 0)},{more}}}'
        return f'"[" {items} "]"' if shortest else f'"[" ({items})? "]"'

    def _object_of(self, schema: Schema, path: str) -> str:
        check_keywords(schema, {"type", "properties", "required", "additionalProperties"}, path)
        properties, required = schema.get("properties") or {}, schema.get("required") or ()
        if unnamed := set(required) - set(properties):
            raise GrammarError(path, "required", f"{min(unnamed)!r} is not among the properties")
        if properties:
            return self.object(properties, [name in required for name in properties], path)
        if schema.get("additionalProperties") is False:
            return '"{" "}"'
        value = self._value(schema.get("additionalProperties"), f"{path}/additionalProperties")
        entry = self._rule(f'/[a-z_]{{1,30}}/ ":" {value}')
        return f'"{{" ({entry} ("," {entry})*)? "}}"'

    def _constant(self, value: Any, path: str) -> str:
        if isinstance(value, dict | list) or QUOTE in str(value):
            raise GrammarError(path, "enum", f"{value!r} cannot be written in this format of tool calls")
        if isinstance(value, str):
            return f"{self._quote} {literal(value)} {self._quote}" if value else f"{self._quote} {self._quote}"
        return literal(json.dumps(value))
