"""Calls that are one JSON object with a name and arguments."""

import json
from collections.abc import Collection

from headwater.generation.tool_formats.reading.call_writer import CallWriter
from headwater.generation.tool_formats.reading.json_text import Emit, read_key, read_string, read_value
from headwater.generation.tool_formats.reading.reader import NotACall, Parse, Reader
from headwater.generation.tool_formats.tool_format import Tools

ARGUMENTS = ("arguments", "parameters")  # families are taught one of them, and write both
BESIDE = ("type", "id", "function")  # what models write beside name and arguments


def read_call(
    reader: Reader, writer: CallWriter, tools: Tools, *, beside: Collection[str] | None = None
) -> Parse[None]:
    """Take `{"name": ..., "arguments": {...}}` and end the call. Keys come in any order.

    `beside`: the other keys that a call may have; None: any. Raises NotACall, CutOff.
    """
    has_name = False
    arguments: list[str] | None = None
    yield from reader.expect("{")
    while True:
        key = yield from read_key(reader)
        if key == "name" and not has_name:
            has_name = True
            writer.start((yield from read_name(reader, tools)))
            writer.arguments("".join(arguments or ()))  # that came before the name
        elif key in ARGUMENTS and arguments is None:
            arguments = []
            yield from read_arguments(reader, writer.arguments if has_name else arguments.append)
        elif beside is None or key in beside:
            yield from read_value(reader, lambda text: None)
        else:
            raise NotACall
        yield from reader.whitespace()
        if (yield from reader.expect(",", "}")) == "}":
            break
    if not has_name:
        raise NotACall
    if arguments is None:
        writer.arguments("{}")
    writer.end()


def read_name(reader: Reader, tools: Tools) -> Parse[str]:
    """Take a JSON string that is the name of a tool."""
    pieces: list[str] = []
    yield from read_string(reader, pieces.append)
    name = json.loads("".join(pieces))
    if name not in tools:
        raise NotACall
    return name


def read_arguments(reader: Reader, emit: Emit) -> Parse[None]:
    """Take one JSON object. Also taken: null for no arguments, and a string that holds the object's text."""
    if (yield from reader.peek()) == "{":
        yield from read_value(reader, emit)
        return
    pieces: list[str] = []
    yield from read_value(reader, pieces.append)
    emit(_object_text(json.loads("".join(pieces))))


def _object_text(value: object) -> str:
    if value is None:
        return "{}"
    try:
        found = json.loads(value) if isinstance(value, str) else None
        if isinstance(found, dict):
            return json.dumps(found, allow_nan=False)
    except (ValueError, RecursionError):
        pass
    raise NotACall
