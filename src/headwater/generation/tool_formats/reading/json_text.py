"""JSON as it comes: one value is read, checked, and handed on piece by piece as soon as the pieces are certain."""

import json
import re
from collections.abc import Callable

from headwater.generation.tool_formats.reading.reader import CutOff, NotACall, Parse, Reader

MAX_DEPTH = 128
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORDS = ("true", "false", "null")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')  # in a string
_WORD = re.compile(r"[\w+.-]+")
_ESCAPED = '"\\/bfnrt'
_HEX = "0123456789abcdefABCDEF"

Emit = Callable[[str], object]


def read_value(reader: Reader, emit: Emit) -> Parse[None]:
    """Take one JSON value and hand its text to `emit`. Line breaks inside strings, which JSON wants escaped, become so.

    Raises NotACall where the text is no JSON, CutOff where it ends too early.
    """
    closers: list[str] = []
    while True:
        is_open = yield from _begin_value(reader, emit, closers)
        if not is_open and not (yield from _end_value(reader, emit, closers)):
            return


def read_string(reader: Reader, emit: Emit) -> Parse[None]:
    """Take one JSON string, its quotes included."""
    emit((yield from reader.expect('"')))
    while True:
        if run := reader.run(_PLAIN):
            emit(run)
        character = yield from reader.next()
        if character == '"':
            emit('"')
            return
        if character == "\\":
            emit((yield from _escape(reader)))
        else:
            emit(escaped(character))


def read_key(reader: Reader) -> Parse[str]:
    """Take one JSON string and its colon, with the space around them."""
    pieces: list[str] = []
    yield from _key(reader, pieces.append)
    yield from reader.whitespace()
    return json.loads("".join(pieces).strip().removesuffix(":"))


def escaped(text: str) -> str:
    """The text as it stands in a JSON string."""
    return json_string(text)[1:-1]


def json_string(text: str) -> str:
    """The text as a JSON string. Half of a surrogate pair, which no UTF-8 can hold, is written as its escape."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(text)
    return json.dumps(text, ensure_ascii=False)


def is_word(text: str) -> bool:
    """Is this a number, true, false or null?"""
    return text in _WORDS or bool(_NUMBER.fullmatch(text))


def _escape(reader: Reader) -> Parse[str]:
    """What follows a backslash, and the backslash."""
    character = yield from reader.next()
    if character in _ESCAPED:
        return "\\" + character
    if character != "u":
        raise NotACall
    digits = ""
    while len(digits) < 4:
        digit = yield from reader.next()
        if digit not in _HEX:
            raise NotACall
        digits += digit
    return "\\u" + digits


def _begin_value(reader: Reader, emit: Emit, closers: list[str]) -> Parse[bool]:
    """Take a value that is no container, or the beginning of a container up to its first value (then: True)."""
    emit((yield from reader.whitespace()))
    character = yield from reader.peek()
    if character == '"':
        yield from read_string(reader, emit)
        return False
    if character in ("{", "["):
        return (yield from _begin_container(reader, emit, closers))
    text = yield from reader.all_of(_WORD)
    if not is_word(text):
        raise NotACall if (yield from reader.peek()) else CutOff
    emit(text)
    return False


def _begin_container(reader: Reader, emit: Emit, closers: list[str]) -> Parse[bool]:
    opener = yield from reader.next()
    closer = "}" if opener == "{" else "]"
    emit(opener)
    emit((yield from reader.whitespace()))
    if (yield from reader.take(closer)):
        emit(closer)
        return False
    if len(closers) == MAX_DEPTH:
        raise NotACall
    closers.append(closer)
    if closer == "}":
        yield from _key(reader, emit)
    return True


def _end_value(reader: Reader, emit: Emit, closers: list[str]) -> Parse[bool]:
    """Take what follows a value in its containers. Is there another value?"""
    while closers:
        emit((yield from reader.whitespace()))
        found = yield from reader.expect(",", closers[-1])
        emit(found)
        if found == ",":
            if closers[-1] == "}":
                yield from _key(reader, emit)
            return True
        closers.pop()
    return False


def _key(reader: Reader, emit: Emit) -> Parse[None]:
    emit((yield from reader.whitespace()))
    yield from read_string(reader, emit)
    emit((yield from reader.whitespace()))
    emit((yield from reader.expect(":")))
