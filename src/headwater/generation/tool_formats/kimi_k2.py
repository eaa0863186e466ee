"""Kimi K2: a section of calls between special tokens; the function's name is part of the call's id."""

import re
from collections.abc import Mapping, Sequence
from functools import partial

from headwater.generation.tool_formats.grammar.text import arguments_json, literal, marker, one_of, repeated, rules
from headwater.generation.tool_formats.reading.call_writer import CallWriter, attempt, section
from headwater.generation.tool_formats.reading.json_calls import read_arguments
from headwater.generation.tool_formats.reading.reader import CutOff, NotACall, Parse, Reader
from headwater.generation.tool_formats.tool_format import Tool, ToolFormat, Tools

SECTION, END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, END_CALL = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_ID = re.compile(r"[^\s<]+")
_NAME = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?")  # in an id


def read(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    while (yield from reader.until((SECTION,), writer.content)):
        calls = section(reader, another=partial(_another, reader), call=partial(_call, reader, writer, tools))
        yield from attempt(reader, writer, calls, opener=SECTION)


def _another(reader: Reader) -> Parse[bool]:
    """Whether another call begins, rather than the section ends. What stands between calls is dropped."""
    found = yield from reader.until((CALL, END_SECTION), lambda noise: None)
    if not found:
        raise CutOff
    return found == CALL


def _call(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    yield from reader.whitespace()
    call_id = yield from reader.all_of(_ID)
    yield from reader.whitespace()
    yield from reader.expect(ARGUMENTS)
    yield from reader.whitespace()
    found = _NAME.fullmatch(call_id)
    if not found or found[1] not in tools:
        raise NotACall
    writer.start(found[1])
    yield from read_arguments(reader, writer.arguments)
    writer.end()
    yield from reader.whitespace()
    yield from reader.close(END_CALL)


def _grammar(tools: Sequence[Tool], parallel: bool, special_tokens: Mapping[str, int]) -> str:
    def mark(text: str) -> str:
        return marker(text, special_tokens)

    named = {
        "start": f"{mark(SECTION)} {repeated('call', '', parallel=parallel)} {mark(END_SECTION)}",
        "call": one_of("call", tools),
    }
    for i, tool in enumerate(tools):
        head = f"{literal(f'functions.{tool.name}:')} /[0-9]{{1,2}}/ {mark(ARGUMENTS)}"
        named[f"call_{i}"] = f"{mark(CALL)} {head} arguments_{i} {mark(END_CALL)}"
        named[f"arguments_{i}"] = arguments_json(tool)
    return rules(named)


KIMI_K2 = ToolFormat(
    name="kimi-k2",
    description="Kimi K2: `<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{json}<|tool_call_end|>`",
    read=read,
    is_of=lambda template: CALL in template and ARGUMENTS in template,
    write_grammar=_grammar,
    needs_special_tokens=True,
    trims=False,
)
