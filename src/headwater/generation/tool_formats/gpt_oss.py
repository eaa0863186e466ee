"""gpt-oss (OpenAI's harmony): the whole answer is messages, each with a channel and perhaps a recipient.

A header such as `<|channel|>commentary to=functions.f <|constrain|>json<|message|>` stands before each message. The
channel `analysis` is thinking, `final` and `commentary` are content, and what goes to `functions.f` is a call.
"""

import re
from collections.abc import Mapping, Sequence

from headwater.generation.tool_formats.grammar.text import arguments_json, literal, marker, one_of, rules
from headwater.generation.tool_formats.reading.call_writer import CallWriter, attempt
from headwater.generation.tool_formats.reading.json_calls import read_arguments
from headwater.generation.tool_formats.reading.reader import Parse, Reader
from headwater.generation.tool_formats.tool_format import Tool, ToolFormat, Tools

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
_TURN = START + "assistant"
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_FUNCTION = "functions."


def read(reader: Reader, writer: CallWriter, tools: Tools) -> Parse[None]:
    while True:
        header: list[str] = []
        found = yield from reader.until((MESSAGE, START, END, CALL, RETURN), header.append)
        if found == MESSAGE:
            yield from _message(reader, writer, tools, "".join(header))
        elif not found:
            if CHANNEL not in "".join(header):
                writer.content("".join(header))
            return


def _message(reader: Reader, writer: CallWriter, tools: Tools, header: str) -> Parse[None]:
    channels, recipients = _CHANNEL.findall(header), _RECIPIENT.findall(header)
    channel, recipient = (found[-1] if found else "" for found in (channels, recipients))
    name = recipient.removeprefix(_FUNCTION)
    if recipient.startswith(_FUNCTION) and name in tools:
        yield from attempt(reader, writer, _call(reader, writer, name))
        yield from reader.until((CALL, END, RETURN, START), _ignore)
    elif recipient and recipient != "assistant":
        yield from reader.until((CALL, END, RETURN, _TURN), _ignore)
    else:
        kinds = {"analysis": writer.reasoning, "final": writer.content, "commentary": writer.content}
        yield from reader.until((END, RETURN, _TURN), kinds.get(channel, _ignore))


def _call(reader: Reader, writer: CallWriter, name: str) -> Parse[None]:
    yield from reader.whitespace()
    writer.start(name)
    yield from read_arguments(reader, writer.arguments)
    writer.end()


def _ignore(text: str) -> None:
    del text


def _opened_by(prompt: str) -> str:
    """The header that the prompt's end has begun."""
    at = prompt.rfind(_TURN)
    tail = prompt[at:] if at >= 0 else ""
    return "" if any(end in tail for end in (END, CALL, RETURN)) else tail


def _grammar(tools: Sequence[Tool], parallel: bool, special_tokens: Mapping[str, int]) -> str:
    """One call, since the model's turn ends behind each. Behind the thinking, the next message has to begin."""
    del parallel

    def mark(text: str) -> str:
        return marker(text, special_tokens)

    named = {"start": f'({mark(START)} "assistant")? call', "call": one_of("call", tools)}
    for i, tool in enumerate(tools):
        recipient = literal(f"commentary to={_FUNCTION}{tool.name} ")
        named[f"call_{i}"] = f'{mark(CHANNEL)} {recipient} {mark(CONSTRAIN)} "json" {mark(MESSAGE)} arguments_{i}'
        named[f"arguments_{i}"] = arguments_json(tool)
    return rules(named)


GPT_OSS = ToolFormat(
    name="gpt-oss",
    description="gpt-oss (harmony): `<|channel|>commentary to=functions.name <|constrain|>json<|message|>{json}`",
    read=read,
    is_of=lambda template: CHANNEL in template and MESSAGE in template,
    write_grammar=_grammar,
    needs_special_tokens=True,
    trims=False,
    is_whole=True,
    opened_by=_opened_by,
)
