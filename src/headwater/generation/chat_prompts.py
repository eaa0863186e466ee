"""From the `messages` of a body to the token ids of a prompt."""

import asyncio
from typing import Any

from headwater.generation.errors import InvalidRequest, bad_request, from_value_error, unsupported
from headwater.generation.prompt_schemas import ChatPrompt
from headwater.generation.text_generation import ENCODE_IN_THREAD_CHARS, TextGenerator

_OF_MESSAGES = ("tools", "documents", "reasoning_effort", "continue_final_message", "chat_template_kwargs")
_GUESSED_CHARS = 1024  # of content that is not a string


async def encode_messages(body: ChatPrompt, generator: TextGenerator) -> list[int]:
    """Token ids of the conversation. InvalidRequest names the field, or the place in `messages`."""
    messages = body.messages or []
    _check_tool_choice(body.tool_choice)
    tools = None if body.tool_choice == "none" else body.tools or None
    tokenizer = generator.tokenizer
    variables = _template_variables(body)

    parses_special = generator.parses_special(body.parse_special_tokens, is_chat=True)

    def encode() -> list[int]:
        for name in ("tools", "documents"):
            if (tools if name == "tools" else body.documents) and not tokenizer.shows(name, has_tools=bool(tools)):
                raise unsupported(name, f"{name}: the chat template of this model has no place for {name}")
        return tokenizer.encode_chat(
            messages,
            tools=tools,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            template_kwargs=variables,
            add_special_tokens=bool(body.add_special_tokens),
            parses_special=parses_special,
        )

    num_chars = sum(len(m["content"]) if isinstance(m.get("content"), str) else _GUESSED_CHARS for m in messages)
    is_quick = num_chars <= ENCODE_IN_THREAD_CHARS
    is_quick = is_quick and not tokenizer.is_slow_for(messages, parses_special=parses_special)
    try:
        return encode() if is_quick else await asyncio.to_thread(encode)
    except InvalidRequest:
        raise
    except ValueError as error:
        message = str(error)
        raise from_value_error(
            ValueError(message.replace("text: ", "messages: ", 1)) if message.startswith("text: ") else error
        ) from error


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


def _check_tool_choice(tool_choice: Any) -> None:
    if tool_choice in ("auto", "none"):
        return
    if tool_choice == "required" or isinstance(tool_choice, dict):
        message = "tool_choice: forcing a tool call is not supported yet; accepted: 'auto', 'none'"
        raise unsupported("tool_choice", message)
    raise bad_request("tool_choice", f"tool_choice: must be 'auto' or 'none', got {tool_choice!r}")
