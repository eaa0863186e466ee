"""Grammar of a Python list of calls. Values are JSON, which the parser reads as well, but for the words of Python."""

from collections.abc import Mapping, Sequence
from typing import Any

from headwater.generation.tool_formats.grammar.raw import followed, parameters_of, path_of, with_definitions
from headwater.generation.tool_formats.grammar.text import (
    json_value,
    literal,
    marker,
    one_of,
    repeated,
    rules,
    separated,
)
from headwater.generation.tool_formats.reading.arguments import types_of_schema
from headwater.generation.tool_formats.tool_format import Tool
from headwater.grammars.errors import GrammarError


def write_grammar(
    tools: Sequence[Tool], parallel: bool, special_tokens: Mapping[str, int], *, markers: tuple[str, str] | None
) -> str:
    """`markers` stand around the list; None: it stands alone."""
    start, end = (marker(text, special_tokens) for text in markers) if markers else ("", "")
    calls = repeated("call", literal(", "), parallel=parallel)
    named = {"start": f'{start} "[" {calls} "]" {end}', "call": one_of("call", tools)}
    for i, tool in enumerate(tools):
        properties, required = parameters_of(tool)
        names = [f"of_{i}_{j}" for j in range(len(properties))]
        arguments, of_arguments = separated(names, required, literal(", "), prefix=f"behind_{i}")
        named[f"call_{i}"] = f"{literal(tool.name + '(')} {arguments} {literal(')')}"
        named |= of_arguments
        for rule, (name, schema) in zip(names, properties.items(), strict=True):
            if not name.isidentifier():
                raise GrammarError(path_of(name), "", "the name of this parameter cannot be written in this format")
            named[rule] = f"{literal(name + '=')} {rule}_value"
            named[f"{rule}_value"] = _value(followed(schema, tool.parameters), tool.parameters)
    return rules(named)


def _value(schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    if types_of_schema(schema, root) == {"boolean"} and "enum" not in schema and "const" not in schema:
        return '"True" | "False"'
    return json_value(with_definitions(schema, root))
