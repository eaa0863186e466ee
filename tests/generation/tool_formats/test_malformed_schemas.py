"""Schemas of tools come from clients: a malformed one is refused where it is enforced, and harmless where it is not."""

from typing import Any

import pytest

from headwater.generation.answer_parser import AnswerParser
from headwater.generation.assistant_message import AssistantMessage
from headwater.generation.tool_formats.formats import TOOL_FORMATS
from headwater.generation.tool_formats.tool_format import Tool
from headwater.grammars.errors import GrammarError

MALFORMED: list[dict[str, Any]] = [
    {"required": 5},
    {"required": [[]]},
    {"required": [{}]},
    {"properties": None, "required": ["a"]},
    {"properties": [1]},
    {"properties": "x", "required": ["x"]},
    *(
        {"properties": {"a": schema}}
        for schema in (
            5,
            {"type": 5},
            {"type": [["string"]]},
            {"type": {}},
            {"type": ["string", None]},
            {"anyOf": 5},
            {"anyOf": [5]},
            {"oneOf": {"x": 1}},
            {"enum": 5},
            {"enum": None},
            {"$ref": 5},
            {"$ref": "#/$defs/x"},
            {"items": 5, "type": "array"},
            {"pattern": 5, "type": "string"},
        )
    ),
]
CALLS = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    "glm": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "qwen3-xml": "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "pythonic": "[f(a=1)]",
}


@pytest.mark.parametrize("parameters", MALFORMED, ids=str)
def test_a_malformed_schema_is_refused_or_allows_anything(parameters: dict[str, Any]) -> None:
    """They were a 500 where a call was forced, and broke the stream where one was read."""
    for tool_format in TOOL_FORMATS.values():
        with pytest.raises(GrammarError):
            tool_format.grammar([Tool("f", parameters)])
    for name, text in CALLS.items():
        message = AssistantMessage(AnswerParser(TOOL_FORMATS[name], None, tools=[Tool("f", parameters)]))
        message.feed(text, is_last=True)
        (call,) = message.tool_calls
        assert call.arguments in ('{"a": 1}', '{"a": "1"}')
