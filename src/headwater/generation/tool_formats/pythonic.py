"""Llama 4, Llama 3.2 and others: the answer is a Python list of calls, `[f(a=1), g()]`."""

import re
from functools import partial

from headwater.generation.tool_formats.grammar.pythonic import write_grammar
from headwater.generation.tool_formats.reading.arguments import ArgumentsWriter
from headwater.generation.tool_formats.reading.call_writer import CallWriter, attempt
from headwater.generation.tool_formats.reading.json_text import MAX_DEPTH, Emit, escaped, is_word
from headwater.generation.tool_formats.reading.reader import CutOff, NotACall, Parse, Reader
from headwater.generation.tool_formats.tool_format import ToolFormat, Tools

MARKERS = {"<|python_start|>": "<|python_end|>", "<|tool_call_start|>": "<|tool_call_end|>"}  # of Llama 4, of LFM2
_NAME = re.compile(r"[\w.-]+")
_KEY = re.compile(r"\w+")
_WORD = re.compile(r"[\w.+-]+")
_WORDS = {"True": "true", "False": "false", "None": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\\": "\\", "'": "'", '"': '"', "\n": ""}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


def read(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    writer.content((yield from reader.whitespace()))
    if (yield from reader.starts_with("[")):
        yield from attempt(reader, writer, _list(reader, writer, tools))
    while opener := (yield from reader.until(tuple(MARKERS), writer.content)):
        yield from attempt(reader, writer, _list(reader, writer, tools), opener=opener)


def _list(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    yield from reader.whitespace()
    yield from reader.expect("[")
    while True:
        yield from reader.whitespace()
        yield from _call(reader, writer, tools)
        if not writer.holds_calls:
            reader.mark()  # what has been given out stays
        yield from reader.whitespace()
        if (yield from reader.expect(",", "]")) == "]":
            break
    writer.confirm()  # a list that does not end is none
    yield from reader.whitespace()
    yield from reader.take(*MARKERS.values())


def _call(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    name = yield from reader.all_of(_NAME)
    yield from reader.expect("(")
    if name not in tools:
        raise NotACall
    writer.start(name)
    arguments = ArgumentsWriter(writer, tools[name])
    yield from reader.whitespace()
    while not (yield from reader.take(")")):
        key = yield from reader.all_of(_KEY)
        yield from reader.whitespace()
        yield from reader.expect("=")
        emit = writer.arguments if arguments.begin(key) else _ignore
        yield from read_literal(reader, emit)
        yield from reader.whitespace()
        if (yield from reader.expect(",", ")")) == ")":
            break
        yield from reader.whitespace()
    arguments.end(is_certain=False)


def _ignore(text: str) -> None:
    del text


def read_literal(reader: Reader, emit: Emit, *, depth: int = 1) -> Parse[None]:
    """Take one Python literal and hand it to `emit` as JSON. JSON's words count as well."""
    yield from reader.whitespace()
    if depth == MAX_DEPTH:
        raise NotACall
    if quote := (yield from reader.take("'", '"')):
        yield from _string(reader, emit, quote)
    elif (yield from reader.take("[")):
        yield from _items(reader, emit, "[]", depth=depth + 1)
    elif (yield from reader.take("(")):
        yield from _items(reader, emit, "()", depth=depth + 1)
    elif (yield from reader.take("{")):
        yield from _items(reader, emit, "{}", depth=depth + 1)
    else:
        word = yield from reader.all_of(_WORD)
        if not (yield from reader.peek()):
            raise CutOff
        emit(_json_of_word(word))


def _items(reader: Reader, emit: Emit, brackets: str, *, depth: int) -> Parse[None]:
    """What stands in brackets, whose first has been taken. A comma may stand behind the last item."""
    opener, closer = brackets
    emit("{" if opener == "{" else "[")
    is_first = True
    yield from reader.whitespace()
    while not (yield from reader.take(closer)):
        if not is_first:
            emit(", ")
        is_first = False
        if opener == "{":
            quote = yield from reader.expect("'", '"')
            yield from _string(reader, emit, quote)
            yield from reader.whitespace()
            yield from reader.expect(":")
            emit(": ")
        yield from read_literal(reader, emit, depth=depth)
        yield from reader.whitespace()
        if not (yield from reader.take(",")) and not (yield from reader.starts_with(closer)):
            yield from reader.expect(closer)
        yield from reader.whitespace()
    emit("}" if opener == "{" else "]")


def _string(reader: Reader, emit: Emit, quote: str) -> Parse[None]:
    """A string, whose first quote has been taken."""
    emit('"')
    plain = re.compile(r"[^'\\]+" if quote == "'" else r'[^"\\]+')
    while True:
        if run := reader.run(plain):
            emit(escaped(run))
        character = yield from reader.next()
        if character == quote:
            emit('"')
            return
        emit(escaped((yield from _escape(reader)) if character == "\\" else character))


def _escape(reader: Reader) -> Parse[str]:
    character = yield from reader.next()
    if character not in _HEX_DIGITS:
        return _ESCAPES.get(character, "\\" + character)
    digits = ""
    while len(digits) < _HEX_DIGITS[character]:
        digits += yield from reader.next()
    try:
        return chr(int(digits, 16))
    except ValueError:
        raise NotACall from None


def _json_of_word(word: str) -> str:
    word = _WORDS.get(word, word)
    if not is_word(word):
        raise NotACall
    return word


PYTHONIC = ToolFormat(
    name="pythonic",
    description="Llama 4, Llama 3.2 (1B, 3B) and others: `[name(key=value)]`",
    read=read,
    is_of=lambda template: "func_name1(params_name1=" in template or "<|python_start|>" in template,
    write_grammar=partial(write_grammar, markers=None),
    needs_special_tokens=True,
    trims=False,
)
LFM2 = ToolFormat(
    name="lfm2",
    description="LFM2: `<|tool_call_start|>[name(key=value)]<|tool_call_end|>`",
    read=read,
    is_of=lambda template: "<|tool_list_start|>" in template or "<|tool_call_start|>" in template,
    write_grammar=partial(write_grammar, markers=("<|tool_call_start|>", "<|tool_call_end|>")),
    needs_special_tokens=True,
    trims=False,
)
