"""Gemma 4: `<|tool_call>call:name{key:<|"|>text<|"|>,other:1}<tool_call|>`.

Only strings are quoted, by a token of their own, and nothing in them is escaped.
"""

import re

from headwater.generation.tool_formats.grammar.gemma4 import write_grammar
from headwater.generation.tool_formats.reading.call_writer import CallWriter, attempt
from headwater.generation.tool_formats.reading.json_text import MAX_DEPTH, Emit, escaped, is_word, json_string
from headwater.generation.tool_formats.reading.reader import CutOff, NotACall, Parse, Reader
from headwater.generation.tool_formats.tool_format import ToolFormat, Tools

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_NAME = re.compile(r"[^\s{<]+")
_KEY = re.compile(r"[^:<{}\[\],]+")
_WORD = re.compile(r"[^,\]}{\[<]+")


def read(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    while (yield from reader.until((OPEN,), writer.content)):
        yield from attempt(reader, writer, _call(reader, writer, tools), opener=OPEN)


def _call(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    yield from reader.whitespace()
    yield from reader.expect("call:")
    name = yield from reader.all_of(_NAME)
    yield from reader.whitespace()
    yield from reader.expect("{")
    if name not in tools:
        raise NotACall
    writer.start(name)
    yield from _object(reader, writer.arguments, depth=1)
    writer.end()
    yield from reader.whitespace()
    yield from reader.close(CLOSE)


def _object(reader: Reader, emit: Emit, *, depth: int) -> Parse[None]:
    """The brace has been taken."""
    emit("{")
    yield from reader.whitespace()
    if not (yield from reader.take("}")):
        found = ","
        while found == ",":
            yield from _key(reader, emit)
            yield from _value(reader, emit, depth=depth)
            yield from reader.whitespace()
            found = yield from reader.expect(",", "}")
            if found == ",":
                emit(", ")
    emit("}")


def _array(reader: Reader, emit: Emit, *, depth: int) -> Parse[None]:
    """The bracket has been taken."""
    emit("[")
    yield from reader.whitespace()
    if not (yield from reader.take("]")):
        found = ","
        while found == ",":
            yield from _value(reader, emit, depth=depth)
            yield from reader.whitespace()
            found = yield from reader.expect(",", "]")
            if found == ",":
                emit(", ")
    emit("]")


def _key(reader: Reader, emit: Emit) -> Parse[None]:
    yield from reader.whitespace()
    if (yield from reader.take(QUOTE)):
        yield from _text(reader, emit)
    else:
        emit(json_string((yield from reader.all_of(_KEY)).strip()))
    yield from reader.expect(":")
    emit(": ")


def _value(reader: Reader, emit: Emit, *, depth: int) -> Parse[None]:
    yield from reader.whitespace()
    if depth == MAX_DEPTH:
        raise NotACall
    if (yield from reader.take(QUOTE)):
        yield from _text(reader, emit)
    elif (yield from reader.take("{")):
        yield from _object(reader, emit, depth=depth + 1)
    elif (yield from reader.take("[")):
        yield from _array(reader, emit, depth=depth + 1)
    else:
        word = yield from reader.all_of(_WORD)
        if not (yield from reader.peek()):
            raise CutOff
        emit(_json_of_word(word.strip()))


def _text(reader: Reader, emit: Emit) -> Parse[None]:
    """A string, whose first quote has been taken."""
    emit('"')
    if not (yield from reader.until((QUOTE,), lambda text: emit(escaped(text)))):
        raise CutOff
    emit('"')


def _json_of_word(word: str) -> str:
    """A number, true, false or null as it stands; any other word is a string without its quotes."""
    if not word:
        raise NotACall
    return word if is_word(word) else json_string(word)


GEMMA4 = ToolFormat(
    name="gemma4",
    description='Gemma 4: `<|tool_call>call:name{key:<|"|>text<|"|>}<tool_call|>`',
    read=read,
    is_of=lambda template: OPEN in template and QUOTE in template,
    write_grammar=write_grammar,
    needs_special_tokens=True,
    trims=False,
)
