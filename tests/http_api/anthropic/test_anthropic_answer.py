"""Answers of Anthropic's API: a stream adds up to the whole answer, and every event is one that its SDK knows."""

import json
from typing import Any

import pytest
from api_under_test import parsed_events
from scripted_replies import STOP, ScriptedReply, call

from headwater.generation.assistant_message import MessageDelta
from headwater.generation.errors import ApiError
from headwater.http_api.anthropic.answer import ANTHROPIC_STREAM, MessagesAnswer
from headwater.messages.generation import Finish

pytestmark = pytest.mark.anyio
SAID = MessageDelta(content="Hi"), MessageDelta(content=" there"), MessageDelta()
CALLED = (
    MessageDelta(reasoning="so"),
    MessageDelta(reasoning=" what"),
    MessageDelta(content="I look"),
    MessageDelta(tool_calls=tuple(call(0, "f", '{"a"', ": 1}"))),
    MessageDelta(tool_calls=tuple(call(1, "g"))),
    MessageDelta(),
)


def answer(*deltas: MessageDelta, hides_thinking: bool = False, **more: Any) -> MessagesAnswer:
    reply: Any = ScriptedReply(*deltas, **more)
    return MessagesAnswer("msg_1", "m", reply, max_tokens=100, hides_thinking=hides_thinking)


async def streamed(answer: MessagesAnswer) -> list[dict[str, Any]]:
    return parsed_events(b"".join([piece async for piece in answer.events()]).decode())


def added_up(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message as an SDK puts it together."""
    message: dict[str, Any] = {}
    inputs: dict[int, str] = {}
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
            case "content_block_delta":
                block, delta = message["content"][event["index"]], event["delta"]
                for name in ("text", "thinking", "signature"):
                    if name in delta:
                        assert delta["type"] == f"{name}_delta"
                        block[name] += delta[name]
                if "partial_json" in delta:
                    inputs[event["index"]] = inputs.get(event["index"], "") + delta["partial_json"]
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
    for index, text in inputs.items():
        message["content"][index]["input"] = json.loads(text)
    return message


@pytest.mark.parametrize("hides_thinking", [False, True])
@pytest.mark.parametrize("deltas", [SAID, CALLED, [MessageDelta()], CALLED[:2], CALLED[3:]])
async def test_a_stream_adds_up_to_the_whole(deltas: list[MessageDelta], *, hides_thinking: bool) -> None:
    whole = await answer(*deltas, hides_thinking=hides_thinking).collect()
    found = added_up(await streamed(answer(*deltas, hides_thinking=hides_thinking)))
    if hides_thinking and deltas == CALLED[:2]:
        assert whole["content"] == [{"type": "text", "text": ""}]
    assert found == whole


async def test_the_order_of_events() -> None:
    kinds = [event["type"] for event in await streamed(answer(*SAID))]
    assert kinds == [
        "message_start", "ping", "content_block_start", "content_block_delta", "content_block_delta",
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    events = await streamed(answer(*CALLED))
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use", "tool_use"]
    open_blocks: list[int] = []
    for event in events:  # one block at a time, each ended
        if event["type"] == "content_block_start":
            assert open_blocks == []
            open_blocks.append(event["index"])
        elif event["type"] == "content_block_delta":
            assert open_blocks == [event["index"]]
        elif event["type"] == "content_block_stop":
            assert open_blocks.pop() == event["index"]
    assert open_blocks == []


async def test_calls_and_thinking_of_a_whole_answer() -> None:
    message = await answer(*CALLED).collect()
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)
    assert message["content"] == [
        {"type": "thinking", "thinking": "so what", "signature": "unsigned"},
        {"type": "text", "text": "I look"},
        {"type": "tool_use", "id": "call_0", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "call_1", "name": "g", "input": {}},
    ]
    counts = {"input_tokens": 6, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4, "output_tokens": 6}
    assert message["usage"] == counts | {"output_tokens_details": {"thinking_tokens": 2}}


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", "no"])
async def test_arguments_that_are_no_object_are_not_lost(arguments: str) -> None:
    message = await answer(MessageDelta(tool_calls=tuple(call(0, "f", arguments)))).collect()
    assert message["content"][0]["input"] == {"unparsed_arguments": arguments}


@pytest.mark.parametrize(
    ("end", "max_new_tokens", "reason", "sequence"),
    [
        (STOP, 100, "end_turn", None),
        (Finish(type="stop", matched=7), 100, "end_turn", None),
        (Finish(type="stop", matched="END"), 100, "stop_sequence", "END"),
        (Finish(type="length"), 100, "max_tokens", None),
        (Finish(type="length"), 99, "model_context_window_exceeded", None),
    ],
)
async def test_reasons(end: Finish, max_new_tokens: int, reason: str, sequence: str | None) -> None:
    message = await answer(*SAID, end=end, max_new_tokens=max_new_tokens).collect()
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


async def test_an_aborted_answer_is_an_error() -> None:
    end = Finish(type="abort", message="aborted by the client")
    with pytest.raises(ApiError):
        await answer(*SAID, end=end).collect()
    with pytest.raises(ApiError) as found:
        await streamed(answer(*SAID, end=end))
    (event,) = parsed_events(ANTHROPIC_STREAM.error(found.value).decode())
    assert (event["type"], event["error"]["code"]) == ("error", "aborted")
