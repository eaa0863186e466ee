"""The sum of an answer's parts is the same however its text was cut."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.generation.answer_parser import AnswerParser
from headwater.generation.reasoning import REASONING_FORMATS
from headwater.generation.tool_formats.formats import TOOL_FORMATS
from headwater.generation.tool_formats.parts import CallArguments, CallEnd, CallStart, Content, ParsedPart, Reasoning
from headwater.generation.tool_formats.reading.call_writer import MAX_HELD, joined
from headwater.generation.tool_formats.tool_format import Tool

TOOLS = [Tool("f", {"properties": {"a": {"type": "string"}, "n": {"type": "integer"}}}), Tool("g")]
HERMES, LLAMA3 = TOOL_FORMATS["hermes"], TOOL_FORMATS["llama3"]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "x </tool_call> y"}}\n</tool_call>'
CALLED = [CallStart("f"), CallArguments('{"a": "x </tool_call> y"}'), CallEnd()]


def parts_of(parser: AnswerParser, pieces: list[str]) -> list[ParsedPart]:
    """Neighbours of one kind joined."""
    return joined([part for piece in pieces for part in parser.feed(piece)] + parser.finish())


def hermes(text: str, **options) -> list[ParsedPart]:
    return parts_of(AnswerParser(HERMES, None, tools=TOOLS, **options), [text])


def llama3(text: str, **options) -> list[ParsedPart]:
    return parts_of(AnswerParser(LLAMA3, None, tools=TOOLS, **options), [text])


# what answers of the families are made of, whole and broken
OBJECT = ['{"name": "f", "arguments": {"a": "b"}}', '{"name": "f", "parameters": {}}', '{"name": "f", "arg', "{}"]
PIECES = {
    None: ["text"],
    "hermes": [CALL, "<tool_call>", "</tool_call>", *OBJECT, '{"arguments": {"n": 1.5e3}, "name": "g"}', "nul", "\\u0"],
    "llama3": ["<|python_tag|>", ";", *OBJECT],
    "qwen3-xml": [
        *("<tool_call>\n", "<function=f>", "<parameter=a>\n", "\n</parameter>", "<parameter=n>", "5", "</function>"),
        *("</tool_call>", "<function=f>\n<parameter=a>\nx\n</parameter>\n</function>", '"</parameter>"'),
    ],
    "glm": [
        *("<tool_call>", "f\n", "<arg_key>a</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>", '{"b":'),
        *("<arg_key>n</arg_key><arg_value>1</arg_value>", "<tool_call>g</tool_call>"),
    ],
    "deepseek-v3": [
        *(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "f",
            "\n```",
        ),
        *(
            "function<｜tool▁sep｜>",
            "f\n```json\n",
            '{"a": "b"}',
            "f<｜tool▁sep｜>{}",
            "function<｜tool▁sep｜>f\n```json\n{}",
        ),
    ],
    "deepseek-v3.2": [
        *(
            "<｜DSML｜function_calls>\n",
            '<｜DSML｜invoke name="f">\n',
            "</｜DSML｜invoke>",
            "</｜DSML｜function_calls>",
        ),
        *('<｜DSML｜parameter name="a" string="true">', "</｜DSML｜parameter>\n", '<｜DSML｜invoke name="g"/>'),
        '<｜DSML｜parameter name="n" string="false">5',
    ],
    "gemma4": [
        *("<|tool_call>", "call:f{", "a:", '<|"|>', "}", "<tool_call|>", ",", "{k:[1,null]}", 'call:f{a:<|"|>b<|"|>}'),
        *("<|channel>thought\n", "<channel|>"),
    ],
    "kimi-k2": [
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "functions.f:0", "{}"),
        *("<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_call_begin|>f:1<|tool_call_argument_begin|>"),
    ],
    "kimi-k3": [
        *("<|open|>", "<|close|>", "<|sep|>", "<|open|>think<|sep|>", "<|close|>think<|sep|>", "response", "tools"),
        *("<|open|>tools<|sep|>", '<|open|>call tool="f" index="1"<|sep|>', "<|close|>call<|sep|>", "1"),
        *('<|open|>argument key="n" type="number"<|sep|>', "<|close|>argument<|sep|>", "<|open|>response<|sep|>"),
    ],
    "mistral": [
        "[TOOL_CALLS]",
        "f",
        "[ARGS]",
        '{"a": "b"}',
        "[CALL_ID]12",
        "[",
        "]",
        "[THINK]",
        "[/THINK]",
        *OBJECT,
        ",",
    ],
    "pythonic": [
        *("[", "f(", "a='x\\n'", ")", "]", ", ", "n=[1, {'k': None}]", "[f(a=1, n=True), g()]", "<|python_start|>"),
        *("<|python_end|>", "(1,)", '"'),
    ],
    "gpt-oss": [
        *("<|start|>assistant", "<|channel|>", "analysis", "final", "commentary to=functions.f ", "<|constrain|>json"),
        *("<|message|>", "<|end|>", "<|call|>", '{"a": "b"}', "<|channel|>analysis<|message|>", " to=functions.g"),
    ],
}
PIECES |= {"deepseek-v3.1": PIECES["deepseek-v3"], "mistral-v3": PIECES["mistral"], "lfm2": PIECES["pythonic"]}
OF_ALL = ["\n", " ", "text", "<", "<think>", "</think>", "é", '"', "{", "}"]


@st.composite
def answers(draw, format_name: str | None) -> str:
    return "".join(draw(st.lists(st.sampled_from(PIECES[format_name] * 2 + OF_ALL), max_size=14)))


@pytest.mark.parametrize("format_name", PIECES)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), holds_calls=st.booleans(), seed=st.integers(0, 1000))
def test_any_cut_gives_the_same_parts(format_name, data, holds_calls, seed):
    text = data.draw(answers(format_name))
    reasoning = data.draw(st.sampled_from([None, *REASONING_FORMATS.values()]))
    tool_format = TOOL_FORMATS[format_name] if format_name else None

    def parser() -> AnswerParser:
        return AnswerParser(tool_format, reasoning, tools=TOOLS, holds_calls=holds_calls)

    cuts = random.Random(seed)
    cut, rest = [], text
    while rest:
        num = cuts.randint(1, cuts.choice([1, 3, 20]))
        cut, rest = [*cut, rest[:num]], rest[num:]
    parts = parts_of(parser(), cut)
    assert parts == parts_of(parser(), [text])
    for arguments in arguments_of_complete_calls(parts) if holds_calls else ():
        assert isinstance(json.loads(arguments), dict)


def arguments_of_complete_calls(parts: list[ParsedPart]) -> list[str]:
    pairs = itertools.pairwise(parts)
    return [part.text for part, end in pairs if end == CallEnd() and isinstance(part, CallArguments)]


def test_every_format_is_tried():
    assert set(PIECES) == {None, *TOOL_FORMATS}


def test_a_marker_inside_a_string_does_not_end_the_call():
    assert hermes("Look:\n" + CALL + "\n" + CALL) == [Content("Look:"), *CALLED, *CALLED]


def test_arguments_come_as_soon_as_they_are_certain_and_no_longer_short():
    parser = AnswerParser(HERMES, None, tools=TOOLS)
    short = '{"a": "' + "x" * (MAX_HELD - 7)
    assert parser.feed('a <tool_call>{"name": "f", "arguments": ' + short) == [Content("a")]
    assert parser.feed("x") == [CallStart("f"), CallArguments(short + "x")]
    assert parser.feed(" far\\u00") == [CallArguments(" far")]
    assert parser.feed('e9"}') == [CallArguments('\\u00e9"}')]
    assert parser.feed("}") == [CallEnd()]


def test_a_held_call_comes_whole_or_not_at_all():
    parser = AnswerParser(HERMES, None, tools=TOOLS, holds_calls=True)
    assert parser.feed(CALL[:-20]) == []
    assert parser.feed(CALL[-20:]) == CALLED
    assert hermes(CALL + CALL[:-20], holds_calls=True) == CALLED
    assert hermes("a\n" + CALL[:-20], holds_calls=True) == [Content("a")]


def test_text_that_only_looks_like_a_call_is_content():
    for text in (
        "if a <tool_b",
        "<tool_call>not json</tool_call>",
        "a\n<tool_call>\n{no}</tool_call> b ",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call>',
    ):
        assert hermes(text, holds_calls=True) == [Content(text)], text


def test_a_cut_off_call_gives_what_is_certain_unless_it_is_short():
    long = '{"a": "' + "b" * MAX_HELD
    text = f'a <tool_call>{{"name": "f", "arguments": {long}\\'
    assert hermes(text) == [Content("a"), CallStart("f"), CallArguments(long)]
    assert hermes(text.replace("b" * MAX_HELD, "b")) == [Content("a")]


def test_a_short_broken_call_is_content_and_a_long_one_ends():
    broken = '<tool_call>{"name": "f", "arguments": {"a": "b"]</tool_call>'
    assert hermes(f"{CALL}{broken}") == [*CALLED, Content(broken)]
    long = '{"a": "' + "b" * MAX_HELD + '"'
    called = [CallStart("f"), CallArguments(long), CallEnd()]
    assert hermes(broken.replace('{"a": "b"', long)) == [*called, Content("]</tool_call>")]


def test_a_short_call_in_a_list_is_given_out_when_it_ends():
    parser = AnswerParser(TOOL_FORMATS["pythonic"], None, tools=TOOLS)
    assert parser.feed("[f(a='b'), ") == [CallStart("f"), CallArguments('{"a": "b"}'), CallEnd()]
    assert parser.feed("g(") == []
    assert parser.feed("?)]") == [Content(", g(?)]")]


def test_keys_come_in_any_order_and_arguments_may_lack():
    assert hermes('<tool_call>{"id": 1, "arguments": {"n": 2}, "name": "f"}</tool_call>') == [
        *(CallStart("f"), CallArguments('{"n": 2}'), CallEnd())
    ]
    assert hermes('<tool_call>{"name": "g"}') == [CallStart("g"), CallArguments("{}"), CallEnd()]
    assert hermes('<tool_call>{"name": "g", "arguments": "{\\"n\\": 2}"}') == [
        *(CallStart("g"), CallArguments('{"n": 2}'), CallEnd())
    ]


def test_line_breaks_inside_a_string_become_json():
    assert hermes('<tool_call>{"name": "f", "arguments": {"a": "1\n2"}}')[1] == CallArguments('{"a": "1\\n2"}')


def test_llama_calls_with_and_without_its_tag():
    call = '{"name": "f", "parameters": {"a": "<|python_tag|>"}}'
    called = [CallStart("f"), CallArguments('{"a": "<|python_tag|>"}'), CallEnd()]
    assert llama3(call) == called
    assert llama3("Wait. <|python_tag|>" + call) == [Content("Wait. "), *called]
    assert llama3(f"{call}; {call}") == [*called, *called]
    for text in ("{}", '{"a": 1} is a dict', '{"name": "Bob"}', "text " + call):
        assert llama3(text, holds_calls=True) == [Content(text)]


def test_thinking_and_answer():
    qwen = REASONING_FORMATS["qwen3"]

    def split(text: str, prompt: str = "") -> list[ParsedPart]:
        return parts_of(AnswerParser(HERMES, qwen, tools=TOOLS, prompt=prompt), [text])

    assert split("<think>\n a \n</think>\n\nb") == [Reasoning("a"), Content("b")]
    assert split("a\n</think>\n\n" + CALL, "<|im_start|>assistant\n<think>\n") == [Reasoning("a"), *CALLED]
    assert split("a </think> b", "<think>\n\n</think>\n\n") == [Content("a </think> b")]
    assert split("a <think> b") == [Content("a <think> b")]
    assert split("<think>a ") == [Reasoning("a ")]
    r1 = AnswerParser(None, REASONING_FORMATS["deepseek-r1"], prompt="<｜Assistant｜>")
    assert parts_of(r1, ["a</think>b"]) == [Reasoning("a"), Content("b")]


def test_formats_of_whole_answers_read_the_content_without_tools():
    answer = "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b <|x"
    for tool_format in (None, TOOL_FORMATS["gpt-oss"]):
        parser = AnswerParser(tool_format, REASONING_FORMATS["gpt-oss"], prompt="<|end|><|start|>assistant")
        assert parts_of(parser, [answer]) == [Reasoning("a"), Content("b <|x")]
    assert parts_of(AnswerParser(TOOL_FORMATS["gpt-oss"], None), [answer]) == [Content("ab <|x")]
    begun = AnswerParser(None, REASONING_FORMATS["gpt-oss"], prompt="<|start|>assistant<|channel|>final<|message|>")
    assert parts_of(begun, ["b"]) == [Content("b")]
    opened = AnswerParser(None, REASONING_FORMATS["kimi-k3"], prompt="<|open|>think<|sep|>")
    assert parts_of(opened, ["a<|close|>think<|sep|><|open|>response<|sep|>b<|close|>response<|sep|>"]) == [
        *(Reasoning("a"), Content("b"))
    ]


@pytest.mark.parametrize("size", range(len("\n</tool_call>")))
def test_a_closing_marker_that_is_cut_off_is_no_content(size):
    whole = '<tool_call>\n{"name": "g", "arguments": {}}'
    assert hermes(whole + "\n</tool_call>"[:size]) == [CallStart("g"), CallArguments("{}"), CallEnd()]
    assert hermes(whole + "\n</b>")[-1] == Content("</b>")


def test_arguments_can_always_be_sent_as_utf8():
    """Half of a surrogate pair comes out as it was escaped."""
    pythonic = AnswerParser(TOOL_FORMATS["pythonic"], None, tools=TOOLS)
    encoded = json.dumps({"name": "f", "arguments": json.dumps({"a": "\ud800"})})
    for parts in (parts_of(pythonic, ["[f(a='\\ud800')]"]), hermes(f"<tool_call>{encoded}</tool_call>")):
        assert parts == [CallStart("f"), CallArguments('{"a": "\\ud800"}'), CallEnd()]
        assert all(part.text.encode() for part in parts if isinstance(part, CallArguments))


def test_deeply_nested_text_is_no_call():
    nested = json.dumps("[" * 100_000)
    text = f'<tool_call>{{"name": "f", "arguments": {nested}}}</tool_call>'
    assert hermes(text, holds_calls=True) == [Content(text)]
    assert hermes("<tool_call>" + "[" * 100_000, holds_calls=True) == [Content("<tool_call>" + "[" * 100_000)]
    deep = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 100_000
    assert hermes(deep, holds_calls=True) == [Content(deep)]
