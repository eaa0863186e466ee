"""JSON schemas: each keyword is enforced or refused by name; nothing is enforced by half."""

import json
from typing import Any

import pytest
from accepting import Language

from headwater.grammars.errors import GrammarError
from headwater.grammars.json_options import JsonOptions
from headwater.grammars.json_schemas import prepare_schema
from headwater.grammars.sources import from_json_schema

POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x"]}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["name"],
            "additionalProperties": False,
        }
    },
}


def closed(required: bool = True, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required else []
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


ENFORCED: list[tuple[Any, list[Any], list[Any]]] = [
    (POINT, [{"x": 1}, {"x": 1, "y": -2}, {"x": 1, "z": "s"}], [{}, {"x": "1"}, {"y": 1}, {"x": 1.5}, []]),
    (TREE, [{"name": "a"}, {"name": "a", "kids": [{"name": "b", "kids": []}]}], [{"name": "a", "kids": [{}]}]),
    ({"enum": ["red", 3, None, [1]]}, ["red", 3, None, [1]], ["blue", 4, True, [2]]),
    ({"const": {"a": [True]}}, [{"a": [True]}], [{"a": [False]}, {}]),
    ({"type": "integer", "minimum": 3, "exclusiveMaximum": 120}, [3, 99, 119], [2, 120, 1000]),
    ({"type": "number", "minimum": 0, "maximum": 1.5}, [0, 0.25, 1.5], [-0.1, 1.51, 2]),
    ({"type": "integer", "multipleOf": 5}, [0, 15, -20], [1, 12]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, [0.5, 1, 0.01], [0, -1, 1.5]),
    ({"type": "integer", "minimum": 4, "exclusiveMinimum": True, "allOf": []} | {"allOf": [{}]}, [5], [4]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "äöü"], ["a", "abcd"]),
    ({"type": "string", "pattern": "^[a-z]+[0-9]$"}, ["ab1"], ["ab", "1", "ab12"]),
    ({"type": "string", "pattern": "b"}, ["abc", "b"], ["ac"]),
    ({"type": "string", "pattern": "^a|b$"}, ["a", "axx", "xxb"], ["xax", "bx"]),
    ({"type": "string", "pattern": "^(a|b)$"}, ["a", "b"], ["ab", "xa"]),
    ({"type": "string", "pattern": "a/\\d"}, ["a/1"], ["a/x", "a/\u0663"]),
    ({"type": "string", "pattern": "(^|,)x($|,)"}, ["x", "a,x", "a,x,b"], ["ax", "xb"]),
    ({"type": "string", "format": "date"}, ["2026-11-29"], ["2026-13-01", "today"]),
    ({"type": "integer", "format": "uint8"}, [0, 255], [-1, 256]),
    ({"type": "integer", "format": "int8", "minimum": 5}, [5, 127], [4, 128]),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}, [[True]], [[], [True] * 3, [1]]),
    ({"type": "array", "prefixItems": [{"const": 1}], "items": False}, [[1], []], [[2], [1, 2]]),
    ({"items": [{"const": 1}], "additionalItems": {"const": 2}, "type": "array"}, [[1, 2, 2]], [[2], [1, 3]]),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "prefixItems": [{"const": 1}],
      "additionalItems": False}, [[1], [1, 2]], [[2]]),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, ["a", 1], [1.5, None]),
    ({"oneOf": [{"type": "string"}, closed(a={"type": "integer"})]}, ["a", {"a": 1}], [{}, 1]),
    ({"allOf": [POINT, {"required": ["y"]}]}, [{"x": 1, "y": 2}], [{"x": 1}]),
    ({"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "anyOf": [{}],
      "additionalProperties": False}, [{}, {"n_a": 1}], [{"a": 1}, {"n_a": "x"}]),
    ({"type": "object", "unevaluatedProperties": False, "properties": {"a": {}}}, [{"a": 1}], [{"b": 1}]),
    ({"type": ["integer", "null"]}, [1, None], ["1"]),
    (True, [1, {}, "a"], []),
    ({"title": "anything", "uniqueItems": False, "x-note": 1, "deprecated": True}, [1, [1, 1]], []),
    ({"type": "object", "properties": {"a/b~c": {"const": 1}, "d": {"$ref": "#/properties/a~1b~0c"}}},
     [{"a/b~c": 1, "d": 1}], [{"d": 2}]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), ENFORCED)
def test_what_is_accepted_is_enforced(schema: Any, good: list[Any], bad: list[Any]) -> None:
    language = Language(from_json_schema(schema))
    assert [value for value in good if json.dumps(value, ensure_ascii=False) not in language] == []
    assert [value for value in bad if json.dumps(value, ensure_ascii=False) in language] == []


REFUSED: list[tuple[Any, str, str]] = [
    ({"properties": {"a": {"not": {}}}}, "#/properties/a", "not"),
    ({"if": {}, "then": {"type": "string"}}, "#", "if"),
    ({"items": {"anyOf": [{}, {"uniqueItems": True}]}}, "#/items/anyOf/1", "uniqueItems"),
    ({"$schema": "http://json-schema.org/draft-04/schema#", "contains": {"const": 1}}, "#", "contains"),
    ({"$schema": "http://json-schema.org/draft-04/schema#", "if": {}, "then": {}}, "#", "if"),
    ({"unevaluatedProperties": False, "allOf": [{}]}, "#", "unevaluatedProperties"),
    ({"dependentRequired": {"a": ["b"]}}, "#", "dependentRequired"),
    ({"propertyNames": {"pattern": "^a"}}, "#", "propertyNames"),
    ({"$dynamicRef": "#a"}, "#", "$dynamicRef"),
    ({"type": "string", "nullable": True}, "#", "nullable"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "#", "x-guidance"),
    ({"properties": {"a": {"x-guidance": {}}}}, "#/properties/a", "x-guidance"),
    ({"additionalPropertys": False}, "#", "additionalPropertys"),
    ({"type": "str"}, "#", "type"),
    ({"type": "string", "format": "color"}, "#", "format"),
    ({"type": "integer", "format": "color"}, "#", "format"),
    ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "#", "oneOf"),
    ({"$ref": "https://example.com/a"}, "#", "$ref"),
    ({"$ref": "#/$defs/none"}, "#", "$ref"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "#/$defs/a", "$ref"),
    ({"anyOf": [{"$ref": "#"}, {"type": "string"}]}, "#", "$ref"),
    ({"properties": {"a": {"$id": "http://x/a", "items": {"$ref": "#/b"}}}}, "#/properties/a", "$id"),
    ({"minimum": 2**53 + 1}, "#", "minimum"),
    ({"const": [2**60]}, "#", "const"),
    ({"minItems": 100_000}, "#", "minItems"),
    ({"maxLength": 10**9}, "#", "maxLength"),
    ({"minProperties": 2}, "#", "minProperties"),
    ({"multipleOf": 0}, "#", "multipleOf"),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "#", "exclusiveMinimum"),
    ({"allOf": [{"exclusiveMaximum": 0}, {"minimum": -0.5, "type": "number"}]}, "#", "exclusiveMaximum"),
    ({"multipleOf": 123456.789}, "#", "multipleOf"),
    ({"const": "\x01"}, "#", "const"),
    ({"properties": {"a": {"properties": {"\x01": {}}}}}, "#/properties/a", "properties"),
    ({"allOf": [{"multipleOf": 65521}, {"multipleOf": 65519}]}, "#", "multipleOf"),
    ({"required": "a"}, "#", "required"),
    ({"properties": []}, "#", "properties"),
    ({"anyOf": []}, "#", "anyOf"),
    ({"enum": []}, "#", "enum"),
    ({"type": "string", "pattern": "(?=a)b"}, "", ""),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "", ""),
    (False, "#", ""),
    ("a schema", "#", ""),
    (closed(a=False), "", ""),
]


@pytest.mark.parametrize(("schema", "path", "keyword"), REFUSED)
def test_what_cannot_be_enforced_is_refused_by_path_and_keyword(schema: Any, path: str, keyword: str) -> None:
    with pytest.raises(GrammarError) as error:
        from_json_schema(schema)
    if path:
        assert (error.value.path, error.value.keyword) == (path, keyword), error.value


def test_alternatives_that_exclude_each_other_are_one_of() -> None:
    """pydantic writes a discriminated union as oneOf of references."""
    cat, dog = closed(kind={"const": "cat"}, lives={"type": "integer"}), closed(kind={"const": "dog"})
    schema = {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}], "$defs": {"Cat": cat, "Dog": dog},
              "discriminator": {"propertyName": "kind"}}  # fmt: skip
    language = Language(from_json_schema(schema))
    assert '{"kind": "cat", "lives": 9}' in language
    assert '{"kind": "dog"}' in language
    assert '{"kind": "dog", "lives": 9}' not in language


def test_a_name_that_is_listed_cannot_come_again_in_another_spelling() -> None:
    """Otherwise a reader would take the second value, which no schema limits."""
    language = Language(from_json_schema(POINT))
    assert '{"x": 1, "x": "no"}' not in language
    assert '{"x": 1, "\\u0078": "no"}' not in language


def test_how_json_is_spaced() -> None:
    compact = Language(from_json_schema(POINT, options=JsonOptions(whitespace="")))
    assert '{"x":1}' in compact
    assert '{"x": 1}' not in compact
    one_space = Language(from_json_schema(POINT, options=JsonOptions(whitespace=" ")))
    assert '{"x": 1}' in one_space
    assert '{"x":  1}' not in one_space
    assert '{\r\n    "x": 1\n}' in Language(from_json_schema(POINT))


def test_objects_are_closed_if_the_client_asks() -> None:
    language = Language(from_json_schema(POINT, options=JsonOptions(closes_objects=True)))
    assert '{"x": 1, "y": 2}' in language
    assert '{"x": 1, "z": 2}' not in language


def test_nesting_and_size_are_bounded() -> None:
    deep: Any = {"type": "string"}
    for _ in range(500):
        deep = {"items": deep}
    with pytest.raises(GrammarError, match="nested"):
        prepare_schema(deep)
    with pytest.raises(GrammarError, match="schemas"):
        prepare_schema({"anyOf": [{"const": n} for n in range(20_000)]})
    with pytest.raises(GrammarError, match="patterns"):
        prepare_schema({"patternProperties": {f"^{n}$": {} for n in range(100)}})


def test_definitions_that_nothing_refers_to_are_left_out() -> None:
    assert prepare_schema({"$defs": {"unused": {"not": {}}}, "type": "null"}) == {"type": "null"}
