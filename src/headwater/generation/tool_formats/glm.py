"""GLM 4.5 and later: `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`."""

import re
from collections.abc import Mapping, Sequence

from headwater.generation.tool_formats.grammar.raw import RawText, raw_calls
from headwater.generation.tool_formats.grammar.text import literal, marker, one_of, repeated, rules
from headwater.generation.tool_formats.reading.arguments import ArgumentsWriter, read_raw
from headwater.generation.tool_formats.reading.call_writer import CallWriter, attempt
from headwater.generation.tool_formats.reading.reader import NotACall, Parse, Reader
from headwater.generation.tool_formats.tool_format import Tool, ToolFormat, Tools

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, END_KEY = "<arg_key>", "</arg_key>"
VALUE, END_VALUE = "<arg_value>", "</arg_value>"
_NAME = re.compile(r"[^\s<>]+")
_KEY = re.compile(r"[^<\n]+")


def read(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    while (yield from reader.until((OPEN,), writer.content)):
        yield from attempt(reader, writer, _call(reader, writer, tools), opener=OPEN)


def _call(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    yield from reader.whitespace()
    name = yield from reader.all_of(_NAME)
    yield from reader.whitespace()
    if name not in tools or not (yield from reader.starts_with(KEY, CLOSE)):
        raise NotACall
    writer.start(name)
    arguments = ArgumentsWriter(writer, tools[name])
    while (yield from reader.another(KEY, CLOSE)):
        yield from _argument(reader, arguments)
    arguments.end()


def _argument(reader: Reader, arguments: ArgumentsWriter) -> Parse[None]:
    name = yield from reader.all_of(_KEY)
    yield from reader.expect(END_KEY)
    yield from reader.whitespace()
    yield from reader.expect(VALUE)

    def is_end(end: str) -> Parse[bool]:
        if end == END_VALUE:
            yield from reader.whitespace()
            return bool((yield from reader.starts_with(KEY, CLOSE)))
        before = reader.position - len(end)  # the value was not closed
        yield from reader.whitespace()
        is_last = bool((yield from reader.starts_with(OPEN))) or not (yield from reader.peek())
        reader.position = before
        return is_last

    value = arguments.value(name.strip())
    yield from read_raw(reader, value, (END_VALUE, CLOSE), is_end)


def _grammar(tools: Sequence[Tool], parallel: bool, special_tokens: Mapping[str, int]) -> str:
    def mark(text: str) -> str:
        return marker(text, special_tokens)

    named = {
        "start": repeated("call", literal("\n"), parallel=parallel),
        "call": f"{mark(OPEN)} function {mark(CLOSE)}",
        "function": one_of("function", tools),
    }
    text = RawText(END_VALUE, (CLOSE,), mark(END_VALUE) if END_VALUE in special_tokens else None)

    def around(name: str, value: str, kind: str) -> str:
        del kind
        return f'{mark(KEY)} {literal(name)} {mark(END_KEY)} "\\n" {mark(VALUE)} {value} "\\n"'

    def call(name: str, arguments: str) -> str:
        return f'{literal(name)} "\\n" {arguments}'

    return rules(named | raw_calls("function", tools, call=call, around=around, text=text))


GLM = ToolFormat(
    name="glm",
    description="GLM 4.5 and later: `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`",
    read=read,
    is_of=lambda template: KEY in template and VALUE in template,
    write_grammar=_grammar,
    needs_special_tokens=True,
)
