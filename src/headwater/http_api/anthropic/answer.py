"""The answer to a message of Anthropic's API, whole or as a stream."""

from collections.abc import AsyncGenerator

from headwater.generation.answer_fields import Json, cached_tokens
from headwater.generation.assistant_message import AssistantMessage, MessageDelta, ToolCallDelta
from headwater.generation.errors import ApiError
from headwater.http_api.error_shapes import anthropic_error
from headwater.http_api.openai.conversation import arguments_object, deltas_of, finished
from headwater.http_api.openai.replies import Reply
from headwater.http_api.sse import StreamForm, event

SIGNATURE = "unsigned"  # clients send thinking back only with a signature; this server checks none


def _named(payload: Json) -> bytes:
    return event(payload, name=payload["type"])


def _error(error: ApiError) -> bytes:
    return _named(anthropic_error(error))


ANTHROPIC_STREAM = StreamForm(error=_error)


class MessagesAnswer:
    """The answer to one request. It owns the reply's generation."""

    def __init__(self, id: str, model: str, reply: Reply, *, max_tokens: int, hides_thinking: bool) -> None:
        self._id = id
        self._model = model
        self._reply = reply
        self._max_tokens = max_tokens
        self._hides_thinking = hides_thinking

    async def collect(self) -> Json:
        """Run to the end; the whole answer. Raises EngineGone, ApiError."""
        message = await finished(self._reply)
        return self._message(self._content(message)) | self._ending()

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as named events. Raises EngineGone, ApiError."""
        blocks = BlockEvents()
        is_first = True
        async for delta, _ in deltas_of(self._reply):
            start = self._start() if is_first else b""
            is_first = False
            if self._hides_thinking:
                delta = delta._replace(reasoning="")
            yield start + blocks.take(delta)
        ending = self._ending()
        usage = ending.pop("usage")
        yield blocks.end() + _named({"type": "message_delta", "delta": ending, "usage": usage})
        yield _named({"type": "message_stop"})

    def close(self) -> None:
        """Abort the request if it still runs."""
        self._reply.generation.close()

    def _start(self) -> bytes:
        message = self._message([]) | {"stop_reason": None, "stop_sequence": None}
        return _named({"type": "message_start", "message": message}) + _named({"type": "ping"})

    def _message(self, content: list[Json]) -> Json:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "usage": self._usage(),
        }

    def _content(self, message: AssistantMessage) -> list[Json]:
        content: list[Json] = []
        if message.reasoning and not self._hides_thinking:
            content.append({"type": "thinking", "thinking": message.reasoning, "signature": SIGNATURE})
        if message.content or not (content or message.tool_calls):
            content.append({"type": "text", "text": message.content})
        for call in message.tool_calls:
            given = arguments_object(call.arguments)
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
        return content

    def _ending(self) -> Json:
        """Why the answer has ended, and its usage."""
        generation = self._reply.generation
        finish = generation.finish
        assert finish is not None, "it has run to its end"
        sequence = finish.matched if isinstance(finish.matched, str) else None
        match self._reply.reason(finish):
            case "tool_calls":
                reason, sequence = "tool_use", None
            case "length":
                is_cut = generation.request.sampling.max_new_tokens < self._max_tokens
                reason = "model_context_window_exceeded" if is_cut else "max_tokens"
            case _:
                reason = "end_turn" if sequence is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": sequence, "usage": self._usage()}

    def _usage(self) -> Json:
        generation = self._reply.generation
        num_cached = cached_tokens(generation.meta)
        return {
            "input_tokens": generation.num_prompt_tokens - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": len(generation.token_ids),
            "output_tokens_details": {"thinking_tokens": self._reply.num_reasoning_tokens},
        }


class BlockEvents:
    """The content of a message as events: blocks one after the other, each with a start, deltas and a stop."""

    def __init__(self) -> None:
        self._num_blocks = 0
        self._open: str | None = None  # the type of the block that has not ended

    def take(self, delta: MessageDelta) -> bytes:
        """The events of what is new."""
        events = b""
        if delta.reasoning:
            events += self._in_block("thinking", {"thinking": "", "signature": ""})
            events += self._delta({"type": "thinking_delta", "thinking": delta.reasoning})
        if delta.content:
            events += self._in_block("text", {"text": ""})
            events += self._delta({"type": "text_delta", "text": delta.content})
        return events + b"".join([self._call(call) for call in delta.tool_calls])

    def end(self) -> bytes:
        """The end of the last block. An answer without content has one empty text, as Anthropic's SDKs expect."""
        begin = b"" if self._num_blocks else self._in_block("text", {"text": ""})
        return begin + self._stop()

    def _call(self, call: ToolCallDelta) -> bytes:
        events = b""
        if call.name is not None:
            events += self._stop() + self._start("tool_use", {"id": call.id, "name": call.name, "input": {}})
        if call.arguments:
            events += self._delta({"type": "input_json_delta", "partial_json": call.arguments})
        return events

    def _in_block(self, kind: str, empty: Json) -> bytes:
        return b"" if self._open == kind else self._stop() + self._start(kind, empty)

    def _start(self, kind: str, empty: Json) -> bytes:
        self._open = kind
        self._num_blocks += 1
        block = {"type": kind} | empty
        return _named({"type": "content_block_start", "index": self._num_blocks - 1, "content_block": block})

    def _delta(self, delta: Json) -> bytes:
        return _named({"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta})

    def _stop(self) -> bytes:
        if self._open is None:
            return b""
        signed = self._delta({"type": "signature_delta", "signature": SIGNATURE}) if self._open == "thinking" else b""
        self._open = None
        return signed + _named({"type": "content_block_stop", "index": self._num_blocks - 1})
