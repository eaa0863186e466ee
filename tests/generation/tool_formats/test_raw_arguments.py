"""Raw values become JSON by the types that the tool's schema allows."""

import json

import pytest

from headwater.generation.tool_formats.reading.arguments import json_of, types_of
from headwater.generation.tool_formats.tool_format import Tool

TOOL = Tool(
    "f",
    {
        "properties": {
            "text": {"type": "string"},
            "either": {"type": ["integer", "null"]},
            "any": {},
            "option": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Point"}]},
            "choice": {"enum": ["a", 1]},
            "const": {"const": True},
            "list": {"items": {}},
            "star": {"$ref": "#/$defs/Star"},
            "circle": {"$ref": "#/$defs/Circle"},
        },
        "$defs": {
            "Point": {"properties": {}},
            "Circle": {"$ref": "#/$defs/Circle"},
            "Star": {"anyOf": [{"$ref": "#/$defs/Star"}] * 30},
        },
    },
)


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("text", {"string"}),
        ("either", {"integer", "null"}),
        ("any", None),
        ("option", {"string", "object"}),
        ("choice", {"string", "integer"}),
        ("const", {"boolean"}),
        ("list", {"array"}),
        ("circle", None),
        ("star", None),  # followed once, not 30 times at each of its levels
        ("unknown", {"string"}),
    ],
)
def test_types_of_a_parameter(name, types):
    assert types_of(TOOL, name) == types


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("5", {"integer"}, 5),
        (" 5 ", {"number"}, 5),
        ("5.0", {"integer"}, 5.0),
        ("5.5", {"integer"}, "5.5"),  # it does not fit, and is not changed
        ("5", {"string", "null"}, "5"),
        ("null", {"string", "null"}, None),
        ("None", {"null"}, None),
        ("True", {"boolean"}, True),
        ("true", {"string", "boolean"}, True),
        ("{'a': [True, None]}", {"object"}, {"a": [True, None]}),
        ('{"a": 1}', {"array"}, '{"a": 1}'),
        ('"5"', {"integer"}, 5),  # JSON in JSON
        ('"a"', {"string", "null"}, '"a"'),
        ("NaN", {"number"}, "NaN"),
        ("a b", None, "a b"),
        ("[1]", None, [1]),
        ("", {"integer"}, ""),
    ],
)
def test_raw_text_becomes_a_value(text, types, value):
    assert json.loads(json_of(text, types)) == value
