"""DeepSeek V3, R1 and V3.1: a section of calls between special tokens.

V3 and R1 write `function<｜tool▁sep｜>name` and the arguments in a Markdown block; V3.1 writes
`name<｜tool▁sep｜>{...}`.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial

from headwater.generation.tool_formats.grammar.text import arguments_json, literal, marker, one_of, repeated, rules
from headwater.generation.tool_formats.reading.call_writer import CallWriter, attempt, section
from headwater.generation.tool_formats.reading.json_calls import read_arguments
from headwater.generation.tool_formats.reading.reader import NotACall, Parse, Reader
from headwater.generation.tool_formats.tool_format import Tool, ToolFormat, Tools

SECTION, END_SECTION = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_NAME = re.compile(r"[^\s<`]+")


def read(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    while (yield from reader.until((SECTION,), writer.content)):
        calls = section(
            reader, another=partial(reader.another, CALL, END_SECTION), call=partial(_call, reader, writer, tools)
        )
        yield from attempt(reader, writer, calls, opener=SECTION)


def _call(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    name = yield from reader.all_of(_NAME)
    yield from reader.expect(SEPARATOR)
    yield from reader.whitespace()
    is_in_block = (yield from reader.peek()) != "{"
    if is_in_block:
        name = yield from reader.all_of(_NAME)
        yield from reader.whitespace()
        yield from reader.expect("```json")
        yield from reader.whitespace()
    if name not in tools:
        raise NotACall
    writer.start(name)
    yield from read_arguments(reader, writer.arguments)
    writer.end()
    yield from reader.whitespace()
    if is_in_block:
        yield from reader.close("```")
    yield from reader.close(END_CALL)


def _grammar(opening: str, closing: str):
    def write(tools: Sequence[Tool], parallel: bool, special_tokens: Mapping[str, int]) -> str:
        def mark(text: str) -> str:
            return marker(text, special_tokens)

        named = {
            "start": f"{mark(SECTION)} {repeated('call', '', parallel=parallel)} {mark(END_SECTION)}",
            "call": one_of("call", tools),
        }
        for i, tool in enumerate(tools):
            head = f"{literal('function')} {mark(SEPARATOR)} {literal(tool.name + opening)}"
            if not opening:
                head = f"{literal(tool.name)} {mark(SEPARATOR)}"
            named[f"call_{i}"] = f"{mark(CALL)} {head} arguments_{i} {closing} {mark(END_CALL)}"
            named[f"arguments_{i}"] = arguments_json(tool)
        return rules(named)

    return write


DEEPSEEK_V3 = ToolFormat(
    name="deepseek-v3",
    description="DeepSeek V3 and R1: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>name` and a block of JSON",
    read=read,
    is_of=lambda template: SEPARATOR in template and "```json" in template,
    write_grammar=_grammar("\n```json\n", literal("\n```")),
    needs_special_tokens=True,
)
DEEPSEEK_V31 = ToolFormat(
    name="deepseek-v3.1",
    description="DeepSeek V3.1: `<｜tool▁call▁begin｜>name<｜tool▁sep｜>{json}<｜tool▁call▁end｜>`",
    read=read,
    is_of=lambda template: SEPARATOR in template,
    write_grammar=_grammar("", ""),
    needs_special_tokens=True,
)
