"""Mistral: `[TOOL_CALLS]` and a list of JSON objects, or since 2025 `[TOOL_CALLS]name[ARGS]{...}` for each call."""

import re
from collections.abc import Mapping, Sequence

from headwater.generation.tool_formats.grammar.text import arguments_json, literal, marker, one_of, repeated, rules
from headwater.generation.tool_formats.reading.call_writer import CallWriter, attempt
from headwater.generation.tool_formats.reading.json_calls import read_arguments, read_call
from headwater.generation.tool_formats.reading.reader import NotACall, Parse, Reader
from headwater.generation.tool_formats.tool_format import Tool, ToolFormat, Tools

OPEN, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME = re.compile(r"[^\s\[{]+")


def read(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    while (yield from reader.until((OPEN,), writer.content)):
        yield from attempt(reader, writer, _calls(reader, writer, tools), opener=OPEN)


def _calls(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    yield from reader.whitespace()
    first = yield from reader.peek()
    if first == "{":
        yield from read_call(reader, writer, tools)
    elif first == "[":
        yield from _list(reader, writer, tools)
    else:
        yield from _call(reader, writer, tools)


def _list(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    yield from reader.expect("[")
    while True:
        yield from reader.whitespace()
        yield from read_call(reader, writer, tools)
        reader.mark()  # what is complete stays
        yield from reader.whitespace()
        if (yield from reader.expect(",", "]")) == "]":
            return


def _call(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    name = yield from reader.all_of(_NAME)
    if (yield from reader.take(ID)):
        yield from reader.all_of(_NAME)
    yield from reader.take(ARGUMENTS)
    yield from reader.whitespace()
    if not (yield from reader.starts_with("{")):
        yield from reader.expect("{")
    if name not in tools:
        raise NotACall
    writer.start(name)
    yield from read_arguments(reader, writer.arguments)
    writer.end()


def _list_grammar(tools: Sequence[Tool], parallel: bool, special_tokens: Mapping[str, int]) -> str:
    named = {
        "start": f'{marker(OPEN, special_tokens)} "[" {repeated("call", literal(", "), parallel=parallel)} "]"',
        "call": one_of("call", tools),
    }
    for i, tool in enumerate(tools):
        head = literal(f'{{"name": {literal(tool.name)}, "arguments": ')
        named |= {f"call_{i}": f'{head} arguments_{i} "}}"', f"arguments_{i}": arguments_json(tool)}
    return rules(named)


def _grammar(tools: Sequence[Tool], parallel: bool, special_tokens: Mapping[str, int]) -> str:
    named = {
        "start": repeated("call", "", parallel=parallel),
        "call": one_of("call", tools),
    }
    for i, tool in enumerate(tools):
        head = f"{marker(OPEN, special_tokens)} {literal(tool.name)} {marker(ARGUMENTS, special_tokens)}"
        named |= {f"call_{i}": f"{head} arguments_{i}", f"arguments_{i}": arguments_json(tool)}
    return rules(named)


MISTRAL = ToolFormat(
    name="mistral",
    description="Mistral since 2025: `[TOOL_CALLS]name[ARGS]{json}`",
    read=read,
    is_of=lambda template: OPEN in template and ARGUMENTS in template,
    write_grammar=_grammar,
    needs_special_tokens=True,
)
MISTRAL_V3 = ToolFormat(
    name="mistral-v3",
    description='Mistral until 2024: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`',
    read=read,
    is_of=lambda template: OPEN in template,
    write_grammar=_list_grammar,
    takes_any_name=True,
    needs_special_tokens=True,
)
