"""The answer of OpenAI's responses, whole or as a stream, and the copy of it that is stored."""

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from headwater.generation.answer_fields import Json, cached_tokens, json_bytes
from headwater.generation.errors import ApiError, bad_request
from headwater.generation.model_facts import ModelFacts
from headwater.http_api.openai.conversation import deltas_of, finished
from headwater.http_api.openai.format import ChatLogprobs
from headwater.http_api.openai.replies import Reply
from headwater.http_api.response_store import Namespace, ResponseStore, StoredResponse
from headwater.http_api.responses.input_items import assistant_message
from headwater.http_api.responses.output_events import Output, whole_delta
from headwater.http_api.responses.schemas import ResponsesRequest
from headwater.http_api.sse import StreamForm, described, event
from headwater.messages.generation import TokenLogprob


def _error(error: ApiError) -> bytes:
    """For an error that `events` has not reported itself."""
    facts = {"code": str(error.code), "message": error.message, "param": error.param}
    return event({"type": "error"} | facts, name="error")


RESPONSES_STREAM = StreamForm(error=_error)


def echoed(body: ResponsesRequest, model: ModelFacts) -> Json:
    """The fields of the request that its response repeats. ApiError 400 if they are no Unicode."""
    defaults = {"temperature": 1.0, "top_p": 1.0} | dict(model.sampling_defaults)
    given = body.model_fields_set
    fields: Json = {
        "model": model.served_name,
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None} | (body.reasoning or {}),
        "service_tier": "default",
        "store": body.store,
        "temperature": body.temperature if "temperature" in given else defaults["temperature"],
        "text": {"format": {"type": "text"}} | (body.text or {}),
        "tool_choice": body.tool_choice,
        "tools": [{"strict": None} | tool for tool in body.tools],
        "top_logprobs": body.top_logprobs,
        "top_p": body.top_p if "top_p" in given else defaults["top_p"],
        "truncation": body.truncation,
        "user": body.user,
    }
    for name, value in fields.items():
        encoded(name, value)
    return fields


def encoded(name: str, value: Any) -> bytes:
    """JSON of a field that the server shows again. ApiError 400 if it holds text or numbers that JSON cannot."""
    try:
        return json_bytes(value)
    except (ValueError, OverflowError) as error:
        raise bad_request(name, f"{name}: cannot be repeated in an answer: {error}") from None


class ResponseAnswer:
    """The answer to one request. It owns the reply's generation."""

    def __init__(
        self,
        id: str,
        reply: Reply,
        *,
        echo: Json,
        input_items: bytes,
        conversation: Sequence[Json],
        logprobs: ChatLogprobs | None,
        namespace: Namespace,
        store: ResponseStore | None,
    ) -> None:
        self._id = id
        self._reply = reply
        self._fields: Json = {"id": id, "object": "response", "created_at": int(time.time())} | echo
        self._input_items = input_items
        self._conversation = conversation  # before this answer, without instructions
        self._logprobs = logprobs
        self._namespace = namespace
        self._store = store
        self._output = Output()

    async def collect(self) -> Json:
        """Run to the end; the whole response. Raises EngineGone, ApiError."""
        message = await finished(self._reply)
        self._output.take(whole_delta(message), self._positions(self._reply.generation.logprobs))
        self._output.end(self._status)
        return self._ended()

    async def events(self) -> AsyncGenerator[bytes]:
        """The response as numbered events. An error before the first event is raised, a later one is an event."""
        has_begun = False
        try:
            async for delta, chunk in deltas_of(self._reply):
                events = [] if has_begun else self._begin()
                has_begun = True
                yield b"".join(events + self._output.take(delta, self._positions(chunk.logprobs)))
        except Exception as error:
            if not has_begun:
                raise
            yield self._failed(described(error))
            return
        closing = self._output.end(self._status)
        response = self._ended()
        yield b"".join([*closing, self._output.event(f"response.{response['status']}", response=response)])

    def close(self) -> None:
        """Abort the request if it still runs."""
        self._reply.generation.close()

    def _begin(self) -> list[bytes]:
        response = self._response("in_progress")
        return [self._output.event(f"response.{name}", response=response) for name in ("created", "in_progress")]

    def _failed(self, error: ApiError) -> bytes:
        failure = {"code": "rate_limit_exceeded" if error.status == 429 else "server_error", "message": error.message}
        response = self._response("failed") | {"error": failure, "output": self._output.items}
        return self._output.event("response.failed", response=response)

    @property
    def _status(self) -> str:
        finish = self._reply.generation.finish
        return "incomplete" if finish is not None and finish.type == "length" else "completed"

    def _ended(self) -> Json:
        """The response, which is stored if it was asked for."""
        status = self._status
        response = self._response(status) | {"output": self._output.items, "usage": self._usage()}
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        if self._store is not None:
            self._store.put(self._id, self._stored(response))
        return response

    def _response(self, status: str) -> Json:
        empty: dict[str, Any] = {"error": None, "incomplete_details": None, "output": [], "usage": None}
        return self._fields | {"status": status} | empty

    def _stored(self, response: Json) -> StoredResponse:
        items = self._output.items
        return StoredResponse(
            response=json_bytes(response),
            input_items=self._input_items,
            conversation=json_bytes([*self._conversation, _message_of(items)]),
            item_ids=tuple(item["id"] for item in items),
            namespace=self._namespace,
        )

    def _positions(self, logprobs: Sequence[TokenLogprob]) -> list[Json]:
        return [] if self._logprobs is None else self._logprobs.content(logprobs)["content"]

    def _usage(self) -> Json:
        generation = self._reply.generation
        num_input, num_output = generation.num_prompt_tokens, len(generation.token_ids)
        return {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": cached_tokens(generation.meta), "cache_write_tokens": 0},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": self._reply.num_reasoning_tokens},
            "total_tokens": num_input + num_output,
        }


def _message_of(items: Sequence[Json]) -> Json:
    """The output as one message of the chat."""
    texts = {"message": "", "reasoning": ""}
    calls = []
    for item in items:
        if item["type"] == "function_call":
            calls.append((item["call_id"], item["name"], item["arguments"]))
        else:
            texts[item["type"]] += "".join(part["text"] for part in item["content"])
    return assistant_message(texts["message"], texts["reasoning"], calls)
