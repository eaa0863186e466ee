"""Events of a response: numbered without gaps, of the SDK's kinds, and they add up to the whole answer."""

import json
from typing import Any

import pytest
from api_under_test import parsed_events
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from scripted_replies import STOP, ScriptedReply, call

from headwater.generation.assistant_message import MessageDelta
from headwater.generation.errors import ApiError
from headwater.http_api.response_store import ResponseStore
from headwater.http_api.responses.answer import ResponseAnswer
from headwater.messages.generation import Finish

pytestmark = pytest.mark.anyio
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
SAID = MessageDelta(content="Hi"), MessageDelta(content=" there"), MessageDelta()
CALLED = (
    MessageDelta(reasoning="so"),
    MessageDelta(reasoning=" what"),
    MessageDelta(content="I look"),
    MessageDelta(tool_calls=tuple(call(0, "f", '{"a"', ": 1}"))),
    MessageDelta(tool_calls=tuple(call(1, "g", "{}"))),
    MessageDelta(),
)
ECHO = {"model": "m", "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}


def answer(*deltas: MessageDelta, store: ResponseStore | None = None, **more: Any) -> ResponseAnswer:
    reply: Any = ScriptedReply(*deltas, **more)
    return ResponseAnswer(
        "resp_1",
        reply,
        echo=ECHO,
        input_items=b"[]",
        conversation=[],
        logprobs=None,
        namespace=(0, "", ""),
        store=store,
    )


async def streamed(answer: ResponseAnswer) -> list[dict[str, Any]]:
    """The events; checks names, numbers, and that each is valid for the SDK."""
    events = parsed_events(b"".join([piece async for piece in answer.events()]).decode())
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        EVENT.validate_python(event)
    return events


def without_ids(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in item.items() if name != "id"} for item in output]


@pytest.mark.parametrize("deltas", [SAID, CALLED, [MessageDelta()], CALLED[:2], CALLED[3:]])
async def test_a_stream_adds_up_to_the_whole(deltas: list[MessageDelta]) -> None:
    whole = await answer(*deltas).collect()
    Response.model_validate(whole)
    events = await streamed(answer(*deltas))
    last = events[-1]["response"]
    assert without_ids(last["output"]) == without_ids(whole["output"])
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == last["output"]
    assert (last["usage"], last["status"]) == (whole["usage"], "completed")
    for index, item in enumerate(last["output"]):
        deltas_of_item = [e["delta"] for e in events if e["type"].endswith(".delta") and e["output_index"] == index]
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert "".join(deltas_of_item) == text


async def test_the_order_of_events() -> None:
    kinds = [event["type"].removeprefix("response.") for event in await streamed(answer(*SAID))]
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    kinds = [event["type"].removeprefix("response.") for event in await streamed(answer(*CALLED))]
    assert kinds[2:9] == [
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
    ]  # fmt: skip
    assert kinds[15:20] == [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
    ]  # fmt: skip


async def test_items_of_a_whole_answer() -> None:
    response = await answer(*CALLED).collect()
    thought, said, first, second = response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "so what"}]
    assert said["content"] == [{"type": "output_text", "text": "I look", "annotations": [], "logprobs": []}]
    assert first.items() >= {"call_id": "call_0", "name": "f", "arguments": '{"a": 1}', "status": "completed"}.items()
    assert second["arguments"] == "{}"
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == 4
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}


async def test_an_answer_cut_by_its_limit_is_incomplete() -> None:
    events = await streamed(answer(*SAID, end=Finish(type="length")))
    assert events[-1]["type"] == "response.incomplete"
    response = events[-1]["response"]
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (response["status"], response["output"][0]["status"]) == ("incomplete", "incomplete")


async def test_a_stream_that_fails_says_so_in_its_last_event() -> None:
    store = ResponseStore(max_responses=5, max_bytes=10_000)
    events = await streamed(answer(*SAID, end=Finish(type="abort", message="aborted"), store=store))
    failed = events[-1]
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"]["code"] == "server_error"
    assert len(store) == 0
    with pytest.raises(ApiError):
        await answer(*SAID, end=Finish(type="abort", message="aborted"), store=store).collect()


@pytest.mark.parametrize("is_stream", [False, True])
async def test_what_is_stored_is_the_answer_and_the_conversation(*, is_stream: bool) -> None:
    store = ResponseStore(max_responses=5, max_bytes=10_000)
    given = answer(*CALLED, store=store, end=STOP)
    if is_stream:
        response = (await streamed(given))[-1]["response"]
    else:
        response = await given.collect()
    assert json.loads(store.get("resp_1", account=0).response) == response
    functions = [
        {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "call_1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    said = {"role": "assistant", "content": "I look", "reasoning_content": "so what", "tool_calls": functions}
    assert store.conversation("resp_1", (0, "", "")) == [said]
    assert store.item(response["output"][2]["id"], (0, "", "")) == response["output"][2]
