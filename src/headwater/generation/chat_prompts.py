"""From the `messages` of a body to the token ids of a prompt."""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from headwater.generation.chat.tool_choice import read_tool_choice
from headwater.generation.chat.tool_prompt import with_tools
from headwater.generation.errors import InvalidRequest, bad_request, from_value_error, unsupported
from headwater.generation.prompt_schemas import ChatPrompt
from headwater.generation.text_generation import ENCODE_IN_THREAD_CHARS, TextGenerator
from headwater.tokenization.chat_messages import normalize_messages

_OF_MESSAGES = ("tools", "documents", "reasoning_effort", "continue_final_message", "chat_template_kwargs")
_GUESSED_CHARS = 1024  # of content that is not a string


async def encode_messages(body: ChatPrompt, generator: TextGenerator) -> list[int]:
    """Token ids of the conversation. InvalidRequest names the field, or the place in `messages`."""
    tools = read_tool_choice(body.tools, body.tool_choice).tools
    messages = body.messages or []
    parses_special = generator.parses_special(body.parse_special_tokens, is_chat=True)
    encode = partial(_encode, body, messages, generator, tools=tools, parses_special=parses_special)
    num_chars = sum(len(m["content"]) if isinstance(m.get("content"), str) else _GUESSED_CHARS for m in messages)
    is_quick = num_chars <= ENCODE_IN_THREAD_CHARS
    is_quick = is_quick and not generator.tokenizer.is_slow_for(messages, parses_special=parses_special)
    try:
        return encode() if is_quick else await asyncio.to_thread(encode)
    except InvalidRequest:
        raise
    except ValueError as error:
        message = str(error)
        raise from_value_error(
            ValueError(message.replace("text: ", "messages: ", 1)) if message.startswith("text: ") else error
        ) from error


def _encode(
    body: ChatPrompt,
    messages: list[dict[str, Any]],
    generator: TextGenerator,
    *,
    tools: Sequence[Mapping[str, Any]],
    parses_special: bool,
) -> list[int]:
    tokenizer = generator.tokenizer
    if body.documents and not tokenizer.shows("documents", has_tools=bool(tools)):
        raise unsupported("documents", "documents: the chat template of this model has no place for documents")

    def encode(shown: list[Any], shown_tools: Sequence[Mapping[str, Any]] | None) -> list[int]:
        return tokenizer.encode_chat(
            shown,
            tools=shown_tools,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            template_kwargs=_template_variables(body),
            add_special_tokens=bool(body.add_special_tokens),
            parses_special=parses_special,
        )

    if not tools or tokenizer.shows("tools", has_tools=True):
        return encode(messages, tools or None)
    if not generator.formats.describes_tools:
        raise unsupported("tools", "tools: the chat template of this model has no place for tools (see --tool-prompt)")
    normalize_messages(messages)  # an error names the place in the messages that were sent
    try:
        return encode(with_tools(messages, tools), None)
    except ValueError:  # some templates take no system message
        return encode(with_tools(messages, tools, has_system=False), None)


def check_no_chat_fields(body: ChatPrompt, *, param: str) -> None:
    """InvalidRequest for a field of `messages` that is given with a text or token ids."""
    for name in _OF_MESSAGES:
        if getattr(body, name):
            raise bad_request(name, f"{name}: goes with messages, not with {param}")


def _template_variables(body: ChatPrompt) -> dict[str, Any]:
    variables = dict(body.chat_template_kwargs or {})
    for name, value in (("reasoning_effort", body.reasoning_effort), ("documents", body.documents)):
        if value:
            variables[name] = value
    return variables
