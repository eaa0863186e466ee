"""DeepSeek V3.2 and later: `<｜DSML｜invoke name="...">` with one `parameter` element for each argument.

The three versions differ in the section's name and in a space behind `｜DSML｜`. String values are raw text.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial

from headwater.generation.tool_formats.grammar.raw import RawText, raw_calls
from headwater.generation.tool_formats.grammar.text import literal, one_of, repeated, rules
from headwater.generation.tool_formats.reading.arguments import ArgumentsWriter, read_raw
from headwater.generation.tool_formats.reading.call_writer import CallWriter, attempt, section
from headwater.generation.tool_formats.reading.reader import NotACall, Parse, Reader
from headwater.generation.tool_formats.tool_format import Tool, ToolFormat, Tools

DSML = "｜DSML｜"
_SECTIONS = {f"<{DSML}function_calls>": "", f"<{DSML}tool_calls>": "", f"<{DSML} calls>": " "}  # and their space
_TO_QUOTE = re.compile(r'[^"\n<>]+')
_IS_STRING = {' string="true">': True, ' string="false">': False, ">": None}


def read(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    while opener := (yield from reader.until(tuple(_SECTIONS), writer.content)):
        tag = f"{DSML}{_SECTIONS[opener]}"
        calls = section(
            reader,
            another=partial(reader.another, f'<{tag}invoke name="', f"</{opener[1:]}"),
            call=partial(_call, reader, writer, tools, tag),
        )
        yield from attempt(reader, writer, calls, opener=opener)


def _call(reader: Reader, writer: CallWriter, tools: Tools, tag: str) -> Parse[None]:
    name = yield from reader.all_of(_TO_QUOTE)
    is_empty = (yield from reader.expect('">', '"/>')) == '"/>'
    if name not in tools:
        raise NotACall
    writer.start(name)
    arguments = ArgumentsWriter(writer, tools[name])
    while not is_empty and (yield from reader.another(f'<{tag}parameter name="', f"</{tag}invoke>")):
        yield from _parameter(reader, arguments, tag)
    arguments.end()


def _parameter(reader: Reader, arguments: ArgumentsWriter, tag: str) -> Parse[None]:
    name = yield from reader.all_of(_TO_QUOTE)
    yield from reader.expect('"')
    is_string = _IS_STRING[(yield from reader.expect(*_IS_STRING))]

    def is_end(end: str) -> Parse[bool]:
        del end
        yield from reader.whitespace()
        return bool((yield from reader.starts_with(f'<{tag}parameter name="', f"</{tag}invoke>")))

    value = arguments.value(name, is_string=is_string)
    yield from read_raw(reader, value, (f"</{tag}parameter>",), is_end)


def _grammar(tools: Sequence[Tool], parallel: bool, special_tokens: Mapping[str, int]) -> str:
    del special_tokens  # only a part of each marker is one, and a template writes it as text
    opening, closing = f"<{DSML}function_calls>\n", f"</{DSML}function_calls>"
    end_parameter, end_call = f"</{DSML}parameter>", f"</{DSML}invoke>\n"
    named = {
        "start": f"{literal(opening)} {repeated('call', '', parallel=parallel)} {literal(closing)}",
        "call": one_of("call", tools),
    }

    def around(name: str, value: str, kind: str) -> str:
        is_string = "true" if kind == "string" else "false"
        head = f'<{DSML}parameter name="{name}" string="{is_string}">'
        return f'{literal(head)} {value} "\\n"'

    def call(name: str, arguments: str) -> str:
        head = f'<{DSML}invoke name="{name}">\n'
        return f"{literal(head)} {arguments} {literal(end_call)}"

    return rules(named | raw_calls("call", tools, call=call, around=around, text=RawText(end_parameter)))


DEEPSEEK_DSML = ToolFormat(
    name="deepseek-v3.2",
    description="DeepSeek V3.2 and V4: `<｜DSML｜invoke name=...>` with `<｜DSML｜parameter>` elements",
    read=read,
    is_of=lambda template: DSML in template,
    write_grammar=_grammar,
    needs_special_tokens=True,
)
