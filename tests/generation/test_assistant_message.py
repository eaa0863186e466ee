"""The message of an answer is the sum of its deltas, streamed or not, and however the text was cut."""

import json
import random
from itertools import count

import pytest

from headwater.generation.answer_parser import AnswerParser
from headwater.generation.assistant_message import AssistantMessage, MessageDelta, ToolCall, new_call_id
from headwater.generation.reasoning import REASONING_FORMATS
from headwater.generation.tool_formats.formats import TOOL_FORMATS
from headwater.generation.tool_formats.reading.call_writer import MAX_HELD
from headwater.generation.tool_formats.tool_format import Tool

TOOLS = [Tool("look", {"properties": {"at": {"type": "string"}}}), Tool("buy")]
LOOK = '<tool_call>\n{"name": "look", "arguments": {"at": "a </tool_call> \\"b\\""}}\n</tool_call>'
BUY = '<tool_call>\n{"name": "buy", "arguments": {}}\n</tool_call>'
TEXT = f"<think>\nHe wants both.\n</think>\n\nLet me see.\n{LOOK}\n{BUY}"


def message(**options) -> AssistantMessage:
    numbers = count()
    parser = AnswerParser(TOOL_FORMATS["hermes"], REASONING_FORMATS["qwen3"], tools=TOOLS)
    return AssistantMessage(parser, new_id=lambda: f"call_{next(numbers)}", **options)


def feed(given: AssistantMessage, pieces: list[str]) -> list[MessageDelta]:
    return [given.feed(piece, is_last=index == len(pieces) - 1) for index, piece in enumerate(pieces)]


def calls_in(deltas: list[MessageDelta]) -> list[ToolCall]:
    """The calls as a client puts them together."""
    calls: list[ToolCall] = []
    for delta in [call for each in deltas for call in each.tool_calls]:
        if delta.id is not None:
            assert delta.index == len(calls) and delta.name is not None and delta.arguments == ""
            calls.append(ToolCall(delta.id, delta.name))
        else:
            assert delta.index == len(calls) - 1, "pieces belong to the newest call"
            calls[delta.index].pieces.append(delta.arguments)
    return calls


def facts(calls: list[ToolCall]) -> list[tuple[str, str, object]]:
    return [(call.id, call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("seed", range(20))
def test_deltas_add_up_to_the_message_for_every_cut(seed: int) -> None:
    cuts = random.Random(seed)
    places = sorted(cuts.sample(range(1, len(TEXT)), k=cuts.randrange(len(TEXT) // 2)))
    pieces = [TEXT[start:end] for start, end in zip([0, *places], [*places, len(TEXT)], strict=True)]
    for streams_reasoning in (True, False):
        given = message(streams_reasoning=streams_reasoning)
        deltas = feed(given, pieces)
        assert "".join(delta.content for delta in deltas) == given.content == "Let me see."
        assert "".join(delta.reasoning for delta in deltas) == given.reasoning == "He wants both."
        expected = [("call_0", "look", {"at": 'a </tool_call> "b"'}), ("call_1", "buy", {})]
        assert facts(calls_in(deltas)) == facts(given.tool_calls) == expected
        if not streams_reasoning:
            assert sum(bool(delta.reasoning) for delta in deltas) == 1


def test_arguments_are_streamed_while_they_are_written() -> None:
    given = message()
    text = TEXT.replace("a </tool_call>", "a </tool_call>" + "x" * MAX_HELD)
    deltas = [given.feed(character) for character in text]
    pieces = [call.arguments for delta in deltas for call in delta.tool_calls if call.arguments]
    assert len(pieces) > 20


def test_reasoning_that_is_not_streamed_comes_even_if_the_answer_ends_within_it() -> None:
    """The last piece may add nothing: its text was empty, or space that belongs to nothing."""
    for pieces, expected in (
        (["<think>a", "b", "c"], ["", "", "abc"]),
        (["<think>a", "bc", ""], ["", "", "abc"]),
    ):
        given = message(streams_reasoning=False)
        assert [delta.reasoning for delta in feed(given, pieces)] == expected
        assert given.reasoning == "abc"


def test_calls_beyond_the_limit_are_dropped_with_what_follows() -> None:
    given = message(max_calls=1)
    deltas = feed(given, ["<think>x</think>a", LOOK, f"b {BUY} c"])
    assert [call.name for call in given.tool_calls] == [call.name for call in calls_in(deltas)] == ["look"]
    assert (given.content, given.reasoning) == ("a", "x")


def test_without_a_parser_all_is_content() -> None:
    given = AssistantMessage()
    assert feed(given, [TEXT[:30], TEXT[30:]]) == [MessageDelta(content=TEXT[:30]), MessageDelta(content=TEXT[30:])]
    assert (given.content, given.reasoning, given.tool_calls) == (TEXT, "", [])


def test_ids_are_in_the_form_of_openai_and_differ() -> None:
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(each.startswith("call_") and set(each[5:]) <= set("0123456789abcdef") for each in ids)
