"""Qwen 3 Coder, Qwen 3.5 and later: `<tool_call>`, `<function=name>`, and `<parameter=key>` around each raw value."""

import re
from collections.abc import Mapping, Sequence

from headwater.generation.tool_formats.grammar.raw import RawText, raw_calls
from headwater.generation.tool_formats.grammar.text import literal, marker, one_of, repeated, rules
from headwater.generation.tool_formats.reading.arguments import ArgumentsWriter, read_raw
from headwater.generation.tool_formats.reading.call_writer import CallWriter, attempt
from headwater.generation.tool_formats.reading.reader import NotACall, Parse, Reader
from headwater.generation.tool_formats.tool_format import Tool, ToolFormat, Tools

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
_NAME = re.compile(r"[^\s<>]+")
_PARAMETER_NAME = re.compile(r"[^<>\n]+")
_VALUE_ENDS = ("\n" + END_PARAMETER, END_PARAMETER, "\n" + PARAMETER, "\n" + END_FUNCTION)


def read(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    while opener := (yield from reader.until((OPEN, FUNCTION), writer.content)):  # some leave <tool_call> out
        yield from attempt(reader, writer, _call(reader, writer, tools, opener), opener=opener)


def _call(reader: Reader, writer: CallWriter, tools: Tools, opener: str) -> Parse[None]:
    if opener == OPEN:
        yield from reader.whitespace()
        yield from reader.expect(FUNCTION)
    name = yield from reader.all_of(_NAME)
    yield from reader.expect(">")
    if name not in tools:
        raise NotACall
    writer.start(name)
    arguments = ArgumentsWriter(writer, tools[name])
    while (yield from reader.another(PARAMETER, END_FUNCTION, CLOSE)):
        yield from _parameter(reader, arguments, tools[name])
    arguments.end()
    yield from reader.whitespace()
    yield from reader.close(CLOSE)


def _parameter(reader: Reader, arguments: ArgumentsWriter, tool: Tool) -> Parse[None]:
    name = yield from reader.all_of(_PARAMETER_NAME)
    yield from reader.expect(">")
    yield from reader.take("\n")

    def is_end(end: str) -> Parse[bool]:
        before = reader.position - len(end.lstrip("\n"))
        if end.endswith(END_PARAMETER):
            yield from reader.whitespace()
            return bool((yield from reader.starts_with(PARAMETER, END_FUNCTION, CLOSE)))
        if end.endswith(PARAMETER):  # its predecessor was not closed
            next_name = yield from reader.all_of(_PARAMETER_NAME)
            is_next = next_name in tool.properties and bool((yield from reader.take(">")))
        else:
            yield from reader.whitespace()
            is_next = bool((yield from reader.starts_with(CLOSE)))
        reader.position = before
        return is_next

    value = arguments.value(name)
    yield from read_raw(reader, value, _VALUE_ENDS, is_end)


def _grammar(tools: Sequence[Tool], parallel: bool, special_tokens: Mapping[str, int]) -> str:
    opening, closing = marker(OPEN, special_tokens), marker(CLOSE, special_tokens)
    named = {
        "start": repeated("call", literal("\n"), parallel=parallel),
        "call": f'{opening} "\\n" function "\\n" {closing}',
        "function": one_of("function", tools),
    }
    text = RawText("\n" + END_PARAMETER, without=(END_PARAMETER, "\n" + PARAMETER, "\n" + END_FUNCTION))

    def around(name: str, value: str, kind: str) -> str:
        del kind
        return f'{literal(PARAMETER + name + ">")} "\\n" {value} "\\n"'

    def call(name: str, arguments: str) -> str:
        return f'{literal(f"{FUNCTION}{name}>")} "\\n" {arguments} {literal(END_FUNCTION)}'

    return rules(named | raw_calls("function", tools, call=call, around=around, text=text))


QWEN3_XML = ToolFormat(
    name="qwen3-xml",
    description="Qwen 3 Coder, Qwen 3.5: `<tool_call><function=name><parameter=key>value</parameter>...`",
    read=read,
    is_of=lambda template: all(mark in template for mark in (OPEN, FUNCTION, PARAMETER)),
    write_grammar=_grammar,
    thinking_ends=(f"{OPEN}\n{FUNCTION}", OPEN + FUNCTION),
)
