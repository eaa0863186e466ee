"""Kimi K3: the whole answer is a tree of elements, `think`, `response` and `tools`, in special tokens."""

import html
import re
from collections.abc import Mapping, Sequence

from headwater.generation.tool_formats.grammar.raw import RawText, raw_calls
from headwater.generation.tool_formats.grammar.text import literal, marker, one_of, repeated, rules
from headwater.generation.tool_formats.reading.arguments import ArgumentsWriter, read_raw
from headwater.generation.tool_formats.reading.call_writer import CallWriter, attempt
from headwater.generation.tool_formats.reading.reader import NotACall, Parse, Reader
from headwater.generation.tool_formats.tool_format import Tool, ToolFormat, Tools

OPEN, CLOSE, SEPARATOR = "<|open|>", "<|close|>", "<|sep|>"
_THINK, _END_THINK = f"{OPEN}think{SEPARATOR}", f"{CLOSE}think{SEPARATOR}"
_RESPONSE, _END_RESPONSE = f"{OPEN}response{SEPARATOR}", f"{CLOSE}response{SEPARATOR}"
_TOOLS, _END_TOOLS = f"{OPEN}tools{SEPARATOR}", f"{CLOSE}tools{SEPARATOR}"
_CALL, _END_CALL = f'{OPEN}call tool="', f"{CLOSE}call{SEPARATOR}"
_ARGUMENT, _END_ARGUMENT = f'{OPEN}argument key="', f"{CLOSE}argument{SEPARATOR}"
_TO_QUOTE = re.compile(r'[^"<]+')
_TO_TAG = re.compile(r"[^<]+")
_TYPE = re.compile(r' type="(\w+)"')
_INDEX = re.compile(r' index="\d+"')


def read(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    starts = (_THINK, _RESPONSE, _TOOLS, OPEN, CLOSE)
    while found := (yield from reader.until(starts, writer.content)):
        if found == _THINK:
            yield from _thinking(reader, writer)
        elif found == _RESPONSE:
            yield from reader.take(_RESPONSE)  # the prompt's, and the model's own
            yield from reader.until((_END_RESPONSE,), writer.content)
        elif found == _TOOLS:
            yield from attempt(reader, writer, _calls(reader, writer, tools), opener=_TOOLS)
        else:  # of the message
            yield from reader.until((SEPARATOR,), lambda name: None)


def _thinking(reader: Reader, writer: CallWriter) -> Parse[None]:
    """The model may answer without ending the thinking that the prompt has opened."""
    if (yield from reader.until((_END_THINK, _RESPONSE), writer.reasoning)) == _RESPONSE:
        yield from reader.until((_END_RESPONSE,), writer.content)


def _calls(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    while True:
        yield from reader.whitespace()
        if (yield from reader.expect(_CALL, _END_TOOLS)) == _END_TOOLS:
            return
        yield from _call(reader, writer, tools)
        reader.mark()  # what is complete stays


def _call(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    name = html.unescape((yield from reader.all_of(_TO_QUOTE)))
    yield from reader.expect('"')
    attributes = yield from reader.all_of(_TO_TAG)
    yield from reader.expect(SEPARATOR)
    if name not in tools or not _INDEX.fullmatch(attributes):
        raise NotACall
    writer.start(name)
    arguments = ArgumentsWriter(writer, tools[name])
    while (yield from reader.another(_ARGUMENT, _END_CALL)):
        yield from _argument(reader, arguments)
    arguments.end()


def _argument(reader: Reader, arguments: ArgumentsWriter) -> Parse[None]:
    name = html.unescape((yield from reader.all_of(_TO_QUOTE)))
    yield from reader.expect('"')
    found = _TYPE.fullmatch((yield from reader.all_of(_TO_TAG)))
    yield from reader.expect(SEPARATOR)
    if not found:
        raise NotACall

    def is_end(end: str) -> Parse[bool]:
        del end
        yield from reader.whitespace()
        return bool((yield from reader.starts_with(_ARGUMENT, _END_CALL)))

    value = arguments.value(name, is_string=found[1] == "string")
    yield from read_raw(reader, value, (_END_ARGUMENT,), is_end)


def _opened_by(prompt: str) -> str:
    """The element that the prompt's end has opened."""
    return next((start for start in (_THINK, _RESPONSE) if prompt.endswith(start)), "")


def _grammar(tools: Sequence[Tool], parallel: bool, special_tokens: Mapping[str, int]) -> str:
    """Behind the thinking, where the response has to begin, or where the prompt has opened it."""
    opened, close, separator = (marker(text, special_tokens) for text in (OPEN, CLOSE, SEPARATOR))

    def element(head: str, body: str, name: str) -> str:
        return f"{opened} {head} {separator} {body} {close} {literal(name)} {separator}"

    end = f"{close} {literal('argument')} {separator}"
    text = RawText(_END_ARGUMENT, (CLOSE, OPEN), end if CLOSE in special_tokens else None)

    response = literal("response")

    def around(name: str, value: str, kind: str) -> str:
        head = f'argument key="{html.escape(name)}" type="{kind}"'
        return f"{opened} {literal(head)} {separator} {value}"

    named = {
        "start": f"({opened} {response} {separator})? {close} {response} {separator} tools",
        "tools": element(literal("tools"), "calls", "tools"),
        "calls": repeated("call", "", parallel=parallel),
        "call": one_of("call", tools),
    }

    def call(name: str, arguments: str) -> str:
        opening, closing = f'call tool="{html.escape(name)}" index="', '"'
        return element(f"{literal(opening)} /[1-9]/ {literal(closing)}", arguments, "call")

    return rules(named | raw_calls("call", tools, call=call, around=around, text=text))


KIMI_K3 = ToolFormat(
    name="kimi-k3",
    description='Kimi K3: `<|open|>call tool="name" index="1"<|sep|>` with `argument` elements',
    read=read,
    is_of=lambda template: OPEN in template and SEPARATOR in template and "argument" in template,
    write_grammar=_grammar,
    needs_special_tokens=True,
    trims=False,
    is_whole=True,
    opened_by=_opened_by,
)
