"""Structural tags: free text, and in it parts of a given form."""

from typing import Any

import pytest
from accepting import Language

from headwater.grammars.errors import GrammarError
from headwater.grammars.structural_tags import from_structural_tag

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"begin": "<function=weather>", "schema": CITY, "end": "</function>"}
TIME = {"begin": "<function=time>", "schema": {"type": "object", "additionalProperties": False}, "end": "</function>"}
LEGACY = {"type": "structural_tag", "structures": [WEATHER, TIME], "triggers": ["<function="]}
CALL = '<function=weather>{"city": "Rome"}</function>'


def tag(begin: str, content: Any, end: Any) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def text(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def triggered(**more: Any) -> dict[str, Any]:
    return {"type": "triggered_tags", "triggers": ["A"], "tags": [tag("A1", text("x"), "B"), tag("A2", text("y"), "B")],
            **more}  # fmt: skip


def test_structures_with_triggers() -> None:
    language = Language(from_structural_tag(LEGACY))
    good = ("", "hello", CALL, f"It is {CALL} and {CALL}", "<func", "<function=time>{}</function>")
    assert [t for t in good if t not in language] == []
    wrong_arguments = '<function=weather>{"town": 1}</function>'
    bad = (
        "<function=",
        "<function=other>{}</function>",
        wrong_arguments,
        f"{CALL}<function=",
        "a <function=weather> b",
    )
    assert [t for t in bad if t in language] == []


FORMATS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (text("hi"), ["hi"], ["", "hii"]),
    ({"type": "regex", "pattern": "[0-9]+"}, ["12"], ["a", ""]),
    ({"type": "json_schema", "json_schema": CITY}, ['{"city":"R"}'], ["{}"]),
    ({"type": "any_text"}, ["", "any\nthing"], []),
    ({"type": "any_text", "excludes": ["no"]}, ["yes", "n o"], ["no", "a note"]),
    ({"type": "sequence", "elements": [text("a"), {"type": "regex", "pattern": "[a-z]+"}, text("z")]},
     ["abz", "azz"], ["az", "abc"]),
    ({"type": "or", "elements": [text("a"), {"type": "json_schema", "json_schema": CITY}]},
     ["a", '{"city":""}'], ["b"]),
    (tag("<think>", {"type": "any_text"}, "</think>"), ["<think></think>", "<think>a < b</think>"],
     ["<think>", "<think>a</think>b", "<think></think></think>"]),
    (tag("<", {"type": "regex", "pattern": "[a-z>]+"}, [">", "/>"]), ["<a>", "<a/>", "<>>"], ["<a", "<>"]),
    (tag("", text("a"), ""), ["a"], [""]),
    (triggered(), ["", "b", "A1xB", "uA2yBvA1xBw"], ["A", "A1", "A1yB", "A3", "A1xBA"]),
    (triggered(at_least_one=True), ["A1xB", "A1xB then A2yB."], ["", "b", "bA1xB"]),
    (triggered(stop_after_first=True), ["b", "bA1xB", ""], ["A1xBb", "A1xBA1xB"]),
    (triggered(at_least_one=True, stop_after_first=True), ["A1xB", "A2yB"], ["", "A1xBA1xB", "A1xB "]),
    (triggered(excludes=["!"]), ["b", "A1xB"], ["b!", "!A1xB"]),
    ({"type": "tags_with_separator", "tags": [tag("<", text("a"), ">")], "separator": ","},
     ["", "<a>", "<a>,<a>"], ["<a>,", "<a><a>"]),
    ({"type": "tags_with_separator", "tags": [tag("<", text("a"), ">")], "separator": "", "at_least_one": True},
     ["<a>", "<a><a>"], [""]),
    ({"type": "tags_with_separator", "tags": [tag("<", text("a"), ">")], "separator": ",", "at_least_one": True,
      "stop_after_first": True}, ["<a>"], ["", "<a>,<a>"]),
]  # fmt: skip


@pytest.mark.parametrize(("form", "good", "bad"), FORMATS)
def test_a_tree_of_formats(form: dict[str, Any], good: list[str], bad: list[str]) -> None:
    language = Language(from_structural_tag({"type": "structural_tag", "format": form}))
    assert [t for t in good if t not in language] == []
    assert [t for t in bad if t in language] == []


REFUSED: list[tuple[Any, str]] = [
    ("tag", "must be an object"),
    ({"format": {"type": "qwen_xml_parameter"}}, "format: type: must be one of const_string"),
    (
        {"format": {"type": "sequence", "elements": [{"type": "any_text"}, text("a")]}},
        "format.elements[0]: type: any_text",
    ),
    ({"format": tag("a", triggered(), "b")}, "format.content: type: triggered_tags"),
    ({"format": triggered(triggers=["A", "C"])}, "format.triggers: no tag begins with 'C'"),
    ({"format": triggered(triggers=["X"])}, "format.tags[0]: begin: must start with one of the triggers"),
    ({"format": {"type": "json_schema", "json_schema": {"not": {}}}}, "format.json_schema: not: cannot be enforced"),
    (
        {"format": {"type": "json_schema", "json_schema": {"items": {"if": {}, "then": {}}}}},
        "json_schema/items: if",
    ),
    ({"structures": "no", "triggers": ["<"]}, "structures: must be a list"),
    ({"structures": [WEATHER], "triggers": []}, "triggers: must be a list"),
    ({"structures": [{"begin": "<a>", "schema": {}}], "triggers": ["<"]}, "structures[0]: end: must be a list"),
    ({"structures": [WEATHER], "triggers": ["X"]}, "structures[0]: begin: must start with one of the triggers"),
    (
        {"structures": [WEATHER | {"schema": {"properties": {"a": {"not": {}}}}}], "triggers": ["<"]},
        "structures[0].schema/properties/a: not: cannot",
    ),
    ({"format": {"type": "tags_with_separator", "tags": [5], "separator": ""}}, "format.tags[0]: must be an object"),
]


@pytest.mark.parametrize(("given", "reason"), REFUSED)
def test_what_cannot_be_expressed_is_an_error_that_says_where(given: Any, reason: str) -> None:
    with pytest.raises(GrammarError) as error:
        from_structural_tag(given)
    assert reason in str(error.value)
