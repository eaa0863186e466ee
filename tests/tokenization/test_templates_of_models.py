"""Our rendering beside Hugging Face transformers', tool history included.

`HEADWATER_CHAT_TEMPLATES` names a folder of `*.jinja` files to add to our own small ones: templates of models are other
people's files and not in this repository. `make test-templates` fetches 70 official ones, which are in the source
distribution of `llama-cpp-python`.
"""

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from test_template_form import KINDS

from headwater.tokenization.chat_template import ChatTemplate

pytestmark = pytest.mark.slow  # imports transformers
FOLDER = os.environ.get("HEADWATER_CHAT_TEMPLATES")
FILES = sorted(Path(FOLDER).glob("*.jinja")) if FOLDER else []
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

ARGUMENTS = {"city": "Rome"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "d"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": PARAMETERS}}]
SYSTEM = {"role": "system", "content": "be kind"}
USER = {"role": "user", "content": "q <|x|> & 'ü'"}
ANSWER = {"role": "assistant", "content": "it is 5 C"}
RESULT = {"role": "tool", "tool_call_id": "call12345", "name": "get_weather", "content": "5 C"}


def call(arguments: Any, **content: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"id": "call12345", "type": "function", "function": function}],
        **content,
    }


AS_SENT = call(json.dumps(ARGUMENTS), content=None)  # by OpenAI's clients
CONVERSATIONS = {
    "plain": ([USER], None),
    "system": ([SYSTEM, USER, ANSWER, USER], None),
    "tools": ([USER], TOOLS),
    "call": ([USER, AS_SENT, RESULT, ANSWER, USER], TOOLS),
    "call last": ([USER, AS_SENT, RESULT], TOOLS),
}


def transformers_text(source: str, messages: list[Any], tools: Any) -> str | None:
    """None: it refuses."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            [messages], tools=tools, chat_template=source, add_generation_prompt=True, **SPECIAL
        )
    except Exception:  # whatever a template raises is a refusal
        return None
    return rendered[0]


@cache
def template_of(source: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens=SPECIAL)


def our_text(source: str, messages: list[Any], tools: Any) -> str | None:
    try:
        return template_of(source).render(messages, tools=tools)
    except ValueError:
        return None


def forms(messages: list[Any]) -> Iterator[list[Any]]:
    """The conversation in every form in which somebody hands it to transformers."""
    for arguments in (ARGUMENTS, json.dumps(ARGUMENTS)):
        for content in ({"content": None}, {"content": ""}, {}):
            yield [call(arguments, **content) if "tool_calls" in message else message for message in messages]


def sources() -> list[Any]:
    own = [pytest.param(source, id=f"own{number}") for number, source in enumerate(KINDS)]
    return own + [pytest.param(file.read_text(encoding="utf-8"), id=file.stem) for file in FILES]


@pytest.mark.parametrize("source", sources())
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_texts_are_those_of_transformers(source: str, name: str) -> None:
    """Each text is one that transformers makes of the conversation in one form, and shows the call."""
    messages, tools = CONVERSATIONS[name]
    ours = our_text(source, messages, tools)
    form = template_of(source).form
    theirs = {transformers_text(source, shaped, tools) for shaped in forms(messages)}
    if "tool" in {message["role"] for message in messages}:
        if ours is not None:
            assert "Rome" in ours
            assert "5 C" in ours
        if not (form.shows_calls and form.shows_results):  # transformers would leave them out
            return
    if form.has_content_parts:
        return
    if theirs == {None} and "| map(" in source and "tojson" in source:  # a generator: other Jinjas have none
        return
    assert ours in theirs
    assert ours is not None or theirs == {None}, "transformers renders it in one form"


@pytest.mark.skipif(not FILES, reason="HEADWATER_CHAT_TEMPLATES names no folder of templates")
def test_official_templates_are_there() -> None:
    assert len(FILES) >= 60
