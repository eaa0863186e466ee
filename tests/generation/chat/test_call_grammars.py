"""Free text with calls in it, and calls or another answer: which texts these grammars accept."""

import json
import re

import pytest
from llguidance import LLMatcher, LLTokenizer

from headwater.generation.chat.call_grammars import calls_or, text_with_calls
from headwater.generation.tool_formats.formats import TOOL_FORMATS
from headwater.generation.tool_formats.tool_format import Tool

PLACE = {"type": "object", "properties": {"at": {"enum": ["x", "y"]}}, "required": ["at"]}
TOOLS = [Tool("look", PLACE), Tool("buy")]
HERMES = TOOL_FORMATS["hermes"]
LOOK = '<tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call>'
BUY = '<tool_call>\n{"name": "buy", "arguments": {}}\n</tool_call>'
BEGUN = ("a <tool_call>not a call", '<tool_call>\n{"name": "sell"', LOOK.replace('"x"', '"z"'), f"{BUY} b <tool_call> ")


def accepts(grammar: str | None, text: str) -> bool:
    """Whether the answer may be exactly this text."""
    assert grammar is not None
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_bytes(text.encode())
    return matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()


def test_text_is_free_until_a_marker_and_then_a_call_follows() -> None:
    grammar = text_with_calls(HERMES.grammar(TOOLS), parallel=True)
    for text in ("", "hello", "if a <tool_call or b", LOOK, f"Well:\n{LOOK}\n{BUY}\nDone.", f"{BUY}{LOOK} {BUY}"):
        assert accepts(grammar, text), text
    for text in BEGUN:
        assert not accepts(grammar, text), text


def test_one_call_at_most() -> None:
    grammar = text_with_calls(HERMES.grammar(TOOLS, parallel=False), parallel=False)
    for text in ("hello", f"Well:\n{LOOK}"):
        assert accepts(grammar, text), text
    for text in (*BEGUN, f"{BUY}\n{LOOK}", f"{BUY} b"):
        assert not accepts(grammar, text), text


@pytest.mark.parametrize("name", [name for name, each in TOOL_FORMATS.items() if not each.is_whole])
def test_every_format_with_a_marker_of_its_own(name: str) -> None:
    """Text alone is accepted, and so is what the forced grammar accepts; llama3 and pythonic begin like other text."""
    tool_format = TOOL_FORMATS[name]
    grammar = text_with_calls(tool_format.grammar(TOOLS), parallel=True)
    assert (grammar is None) == (name in ("llama3", "pythonic"))
    if grammar is not None:
        assert accepts(grammar, "a {b} [c] <d>")
        marker = re.search(r'"((?:<|\[)[^"]*)"', tool_format.grammar(TOOLS))
        assert marker is not None
        assert not accepts(grammar, f"a {json.loads(marker[0])}!")


def test_calls_or_an_answer_in_another_form() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    for answer in ('start: "{" /[0-9]+/ "}"', json.dumps({"grammars": [{"json_schema": schema}]})):
        grammar = calls_or(HERMES.grammar(TOOLS), answer)
        assert accepts(grammar, f"{LOOK}\n{BUY}")
        assert accepts(grammar, '{"a": 1}' if "json_schema" in answer else "{12}")
        for text in ("hello", f"a {LOOK}", '{"b": 1}', LOOK + '{"a": 1}'):
            assert not accepts(grammar, text), text
