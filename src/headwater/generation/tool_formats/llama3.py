"""Llama 3.1 and later: the answer is one JSON object with `name` and `parameters`, perhaps behind `<|python_tag|>`."""

from collections.abc import Mapping, Sequence

from headwater.generation.tool_formats.grammar.text import arguments_json, literal, one_of, rules
from headwater.generation.tool_formats.reading.call_writer import CallWriter, attempt
from headwater.generation.tool_formats.reading.json_calls import BESIDE, read_call
from headwater.generation.tool_formats.reading.reader import Parse, Reader
from headwater.generation.tool_formats.tool_format import Tool, ToolFormat, Tools

TAG = "<|python_tag|>"
BETWEEN = ";"  # calls; the models were not trained to write several, and do so


def _read(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    if (yield from _starts_with_object(reader, writer)):
        yield from _calls(reader, writer, tools, opener="")
    while (yield from reader.until((TAG,), writer.content)):
        yield from _calls(reader, writer, tools, opener=TAG)


def _starts_with_object(reader: Reader, writer: CallWriter) -> Parse[bool]:
    writer.content((yield from reader.whitespace()))
    return (yield from reader.peek()) == "{"


def _calls(reader: Reader, writer: CallWriter, tools: Tools, *, opener: str) -> Parse[None]:
    while True:
        yield from attempt(reader, writer, _call(reader, writer, tools, has_tag=bool(opener)), opener=opener)
        if not writer.is_after_call:
            return
        opener = yield from reader.take(BETWEEN)
        if not opener:
            return


def _call(reader: Reader, writer: CallWriter, tools: Tools, *, has_tag: bool) -> Parse[None]:
    yield from reader.whitespace()
    yield from read_call(reader, writer, tools, beside=None if has_tag else BESIDE)
    yield from reader.whitespace()


def _grammar(tools: Sequence[Tool], parallel: bool, special_tokens: Mapping[str, int]) -> str:
    del parallel, special_tokens  # one call without a tag, as the templates teach
    named = {"start": one_of("call", tools)}
    for i, tool in enumerate(tools):
        opening = f'{{"name": {literal(tool.name)}, "parameters": '
        named |= {f"call_{i}": f'{literal(opening)} arguments_{i} "}}"', f"arguments_{i}": arguments_json(tool)}
    return rules(named)


LLAMA3 = ToolFormat(
    name="llama3",
    description='Llama 3.1 to 3.3: `{"name": ..., "parameters": {...}}`, perhaps behind `<|python_tag|>`',
    read=_read,
    is_of=lambda template: '"parameters": ' in template and ("<|python_tag|>" in template or "ipython" in template),
    write_grammar=_grammar,
    takes_any_name=True,
    needs_special_tokens=True,  # the tag
    trims=False,
)
