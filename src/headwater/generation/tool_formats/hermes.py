"""Hermes and Qwen: `<tool_call>` around one JSON object with `name` and `arguments`."""

import re
from collections.abc import Mapping, Sequence

from headwater.generation.tool_formats.grammar.text import arguments_json, literal, marker, one_of, repeated, rules
from headwater.generation.tool_formats.reading.call_writer import CallWriter, attempt
from headwater.generation.tool_formats.reading.json_calls import read_call
from headwater.generation.tool_formats.reading.reader import Parse, Reader
from headwater.generation.tool_formats.tool_format import Tool, ToolFormat, Tools

_NAME = re.compile(r'\\?"name\\?":')  # in a template, where quotes may be escaped
OPEN, CLOSE = "<tool_call>", "</tool_call>"


def _read(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    while (yield from reader.until((OPEN,), writer.content)):
        yield from attempt(reader, writer, _call(reader, writer, tools), opener=OPEN)


def _call(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    yield from reader.whitespace()
    yield from read_call(reader, writer, tools)
    yield from reader.whitespace()
    yield from reader.close(CLOSE)


def _grammar(tools: Sequence[Tool], parallel: bool, special_tokens: Mapping[str, int]) -> str:
    named = {
        "start": repeated("call", literal("\n"), parallel=parallel),
        "call": f'{marker(OPEN, special_tokens)} "\\n" body "\\n" {marker(CLOSE, special_tokens)}',
        "body": one_of("body", tools),
    }
    for i, tool in enumerate(tools):
        opening = f'{{"name": {literal(tool.name)}, "arguments": '
        named |= {f"body_{i}": f'{literal(opening)} arguments_{i} "}}"', f"arguments_{i}": arguments_json(tool)}
    return rules(named)


HERMES = ToolFormat(
    name="hermes",
    description="Hermes 2 Pro, Qwen 2.5, Qwen 3: `<tool_call>{json}</tool_call>`",
    read=_read,
    is_of=lambda template: OPEN in template and bool(_NAME.search(template)) and "<tool_calls>" not in template,
    write_grammar=_grammar,
    takes_any_name=True,
)
